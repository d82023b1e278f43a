"""Loads the modules that a service would load and prints "ready". With the argument "wait" it then waits."""
import sys
import time

import flask
import numpy
import requests

print("ready", numpy.arange(10).sum(), flask.Flask("app").name, requests.__version__, flush=True)
open("/tmp/ready", "w").close()
while "wait" in sys.argv:
    time.sleep(1000)
