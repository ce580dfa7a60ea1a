#!/usr/bin/env node
/** The `lc` command. */
import { program, runProgram } from './program.js';

runProgram(program(), process.argv.slice(2)).then((code) => {
  process.exitCode = code;
});
