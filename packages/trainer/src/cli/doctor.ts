/** `lc doctor`: the report of @lc/vram-probe, about the packages that the trainer sees. */
import { fileURLToPath } from 'node:url';
import { runDoctor } from '@lc/vram-probe';

export async function doctorCommand(flags: { json?: boolean }): Promise<void> {
  const code = await runDoctor({ json: flags.json ?? false, from: [fileURLToPath(import.meta.url)] });
  if (code !== 0) process.exitCode = code;
}
