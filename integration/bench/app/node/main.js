// Loads what a service would, then says so and waits, unless it was told to end.
const fs = require("fs");
require("express");
require("lodash");
require("webpack");
require("eslint");
console.log("ready");
fs.writeFileSync("/tmp/ready", "");
if (process.argv.includes("wait")) setInterval(() => {}, 1000000);
