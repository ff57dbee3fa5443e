CREATE DATABASE mlflow OWNER freshet;
