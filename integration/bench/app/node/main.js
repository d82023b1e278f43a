// Loads the modules that a service would load and prints "ready". With the argument "wait" it then waits.
const fs = require("fs");
require("express");
require("lodash");
require("webpack");
require("eslint");
console.log("ready");
fs.writeFileSync("/tmp/ready", "");
if (process.argv.includes("wait")) setInterval(() => {}, 1000000);
