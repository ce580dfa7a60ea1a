#!/usr/bin/env node
import { probe } from './index.js';

const usage = 'vram-probe [--json]: what this machine has for training: RAM, CPUs, GPUs, and why CUDA is not available, if it is not\n';
const unknown = process.argv.slice(2).filter((flag) => !['--json', '--help', '-h'].includes(flag));
const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;

function report(): string {
  const { ram, cpus, gpus, nvidiaDriver, cuda } = probe();
  const lines = [
    `RAM   ${gib(ram.availableBytes)} available of ${gib(ram.totalBytes)}${ram.limitedBy ? ` (limit ${ram.limitedBy}; the machine has ${gib(ram.physicalBytes)})` : ''}`,
    `CPUs  ${cpus}`,
    ...gpus.map(
      (g) =>
        `${g.device}  ${g.name}, compute ${g.computeCapability ?? '?'}, driver for CUDA ${g.driver ?? '?'}, ${gib(g.freeBytes)} free of ${gib(g.totalBytes)}`,
    ),
    ...(nvidiaDriver ? [`driver  NVIDIA ${nvidiaDriver}`] : []),
    cuda.available ? 'cuda  available' : `cuda  not available: ${cuda.code}: ${cuda.message}`,
  ];
  return `${lines.join('\n')}\n`;
}

if (unknown.length > 0) {
  process.stderr.write(`vram-probe: unknown ${unknown.join(' ')}\n${usage}`);
  process.exitCode = 2;
} else if (process.argv.includes('--help') || process.argv.includes('-h')) process.stdout.write(usage);
else process.stdout.write(process.argv.includes('--json') ? `${JSON.stringify({ schema: 1, ...probe() })}\n` : report());
