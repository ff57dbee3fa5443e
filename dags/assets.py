"""The assets that link the DAGs: events -> interactions -> sequences -> release -> serving.

An event of an asset carries the result of the step that updated it. It is a signal; what there is to do is always
computed from manifests.
"""

from airflow.sdk import Asset

EVENTS = Asset("events", group="freshet")
INTERACTIONS = Asset("interactions", group="freshet")
SEQUENCES = Asset("sequences", group="freshet")
WINDOWS = Asset("window_sequences", group="freshet")
PARAMETERS = Asset("parameters", group="freshet")
RELEASE = Asset("release", group="freshet")
SERVING = Asset("serving", group="freshet")
