#!/usr/bin/env node
import { runDoctor } from './index.js';

const usage =
  'vram-probe [--json]: what this machine and this installation have for training (RAM, CPUs, GPUs, driver, copy bandwidth, @lc packages), and what would not work and why\n' +
  'Exit codes: 0 ok, also without a GPU; 2 bad usage; 3 an @lc package does not load\n';
const flags = process.argv.slice(2);
const unknown = flags.filter((flag) => !['--json', '--help', '-h'].includes(flag));

if (unknown.length > 0) {
  process.stderr.write(`vram-probe: unknown ${unknown.join(' ')}\n${usage}`);
  process.exitCode = 2;
} else if (flags.includes('--help') || flags.includes('-h')) {
  process.stdout.write(usage);
} else {
  void runDoctor({ json: flags.includes('--json') }).then((code) => {
    process.exitCode = code;
  });
}
