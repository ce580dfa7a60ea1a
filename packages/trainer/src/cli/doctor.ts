/** `lc doctor` */
import { buildInfo, numThreads } from '@lc/tensor';
import { probe } from '@lc/vram-probe';
import { gib } from './progress.js';

export function doctorCommand(flags: { json?: boolean }): void {
  const report = {
    schema: 1,
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
    build: buildInfo(),
    threads: numThreads(),
    ...probe(),
  };
  if (flags.json) {
    process.stdout.write(`${JSON.stringify(report)}\n`);
    return;
  }
  const lines = [
    `node      ${report.node} on ${report.platform}`,
    `@lc       ${report.build.version}, ABI ${report.build.abi}, ${report.build.cuda ? `CUDA ${report.build.cudaTargets ?? ''}` : 'CPU only'}`,
    `CPU       ${report.threads} threads`,
    `RAM       ${gib(report.ram.availableBytes)} available of ${gib(report.ram.totalBytes)}`,
    ...report.gpus.map(
      (gpu) =>
        `${gpu.device.padEnd(9)} ${gpu.name}, compute ${gpu.computeCapability ?? '?'}, ${gib(gpu.freeBytes)} free of ${gib(gpu.totalBytes)}`,
    ),
    ...(report.cuda.available ? [] : [`cuda      not available: ${report.cuda.code}: ${report.cuda.message}`]),
  ];
  process.stdout.write(`${lines.join('\n')}\n`);
}
