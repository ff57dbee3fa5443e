#!/usr/bin/env bash
# Prepares a fresh Debian or Ubuntu machine: compiler, JDK 17+, a virtual environment with the locked dependencies.
# Each part is skipped when it is already there, so running it again is cheap.
set -euo pipefail
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
UV_VERSION=0.13.9

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

apt_install() { # what-for package...
  local purpose=$1; shift
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $* ($purpose)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
  else
    fail "$purpose is missing; run: sudo apt-get install -y $*"
  fi
}

java_major() { javac -version 2>&1 | sed -nE 's/^javac ([0-9]+).*/\1/p'; }

command -v "$PYTHON" >/dev/null || fail "no $PYTHON; run: sudo apt-get install -y python3 python3-venv python3-dev"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$PYTHON is $("$PYTHON" -V 2>&1); Freshet needs Python 3.11 or newer (make PYTHON=python3.11 ...)"
command -v g++ >/dev/null || apt_install "a C++17 compiler" g++ make
[ "$(java_major || true)" -ge 17 ] 2>/dev/null || apt_install "a JDK 17 or newer (Spark needs a full JDK)" openjdk-17-jdk-headless
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$include/Python.h" ] || apt_install "the Python headers" python3-dev

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VENV" || { apt_install "the venv module" python3-venv; "$PYTHON" -m venv "$VENV"; }
fi

echo "installing the locked dependencies into $VENV"
pip="$VENV/bin/python -m pip install -q --disable-pip-version-check"
torch=$(grep -E '^torch==' requirements.lock)
# torch goes first and by pip, which also finds a CPU build in a local --find-links folder; uv is quicker for the rest.
$pip "uv==$UV_VERSION" "$torch" 2> >(grep -v '^WARNING: Location' >&2)
"$VENV/bin/uv" pip install -q -p "$VENV" -r requirements.lock
touch "$VENV/.installed"
