#!/usr/bin/env node
import { probe } from './index.js';

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const report = probe();
if (process.argv.includes('--json')) {
  process.stdout.write(`${JSON.stringify({ schema: 1, ...report })}\n`);
} else {
  const lines = [
    `RAM   ${gib(report.ram.availableBytes)} available of ${gib(report.ram.totalBytes)}`,
    `CPUs  ${report.cpus}`,
    ...report.gpus.map(
      (g) => `${g.device}  ${g.name}, compute ${g.computeCapability ?? '?'}, ${gib(g.freeBytes)} free of ${gib(g.totalBytes)}`,
    ),
    report.cuda.available ? 'cuda  available' : `cuda  not available: ${report.cuda.code}: ${report.cuda.message}`,
  ];
  process.stdout.write(`${lines.join('\n')}\n`);
}
