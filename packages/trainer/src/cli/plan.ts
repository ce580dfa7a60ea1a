/** `lc plan`: will it fit, and how. Exit code 3 when it does not. */
import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { LcError, LcTypeError } from '@lc/tensor';
import { modelShapeFromConfig, plan } from '@lc/vram-probe';
import { readJson } from '../files.js';
import { parseBytes, wholeNumber } from './exit.js';
import { gib } from './progress.js';

interface PlanFlags {
  tokens: string;
  device: string;
  vram?: string;
  ram?: string;
  loraR: string;
  layersPerSegment?: string;
  json?: boolean;
}

const segmentOf = (text: string): number | 'auto' => (text === 'auto' ? text : wholeNumber('--layers-per-segment', text, 1));

export function planCommand(model: string, flags: PlanFlags): void {
  if (!existsSync(model)) throw new LcError('ERR_LC_MODEL', `${model}: no such folder or file; give a model folder, or its config.json`);
  const file = statSync(model).isDirectory() ? join(model, 'config.json') : model;
  const shape = modelShapeFromConfig(readJson(file, 1 << 20));
  if (flags.device !== 'cpu' && flags.device !== 'cuda')
    throw new LcError('ERR_LC_CONFIG', `--device: expected cpu or cuda, got '${flags.device}'`);
  const r = wholeNumber('--lora-r', flags.loraR, 1);
  let p: ReturnType<typeof plan>;
  try {
    p = plan({
      model: shape,
      tokens: wholeNumber('--tokens', flags.tokens, 1),
      device: flags.device,
      lora: { r, dropout: 0 },
      keep: 'auto',
      ...(flags.layersPerSegment ? { layersPerSegment: segmentOf(flags.layersPerSegment) } : {}),
      ...(flags.vram ? { vramBudget: parseBytes('--vram', flags.vram) } : {}),
      ...(flags.ram ? { ramBudget: parseBytes('--ram', flags.ram) } : {}),
    });
  } catch (error) {
    if (error instanceof LcTypeError) throw new LcError('ERR_LC_CONFIG', error.message, { cause: error });
    throw error;
  }
  if (!p.fits) process.exitCode = 3;
  if (flags.json) {
    process.stdout.write(`${JSON.stringify({ schema: 1, ...p })}\n`);
    return;
  }
  const row = (name: string, bytes: number): string => `  ${name.padEnd(34)}${gib(bytes).padStart(11)}`;
  const lines = [
    `${p.tokens} tokens on ${flags.device}: chunks of ${p.chunk}, MLP tiles of ${p.tile}, loss chunks of ${p.lossChunk}, ${p.segment === 1 ? 'a checkpoint for every layer' : `a checkpoint for ${p.segment} layers`}`,
    row('weights (4-bit base)', p.bytes.weights),
    ...(p.bytes.context > 0 ? [row('context: CUDA, cuBLASLt, kernels', p.bytes.context)] : []),
    row('adapters, gradients, optimizer', p.bytes.adapters + p.bytes.optimizer),
    row('K, V, dK, dV of one layer', p.bytes.kv + p.bytes.dkv),
    row('one layer dequantized', p.bytes.dequantized),
    row('one chunk', p.bytes.chunkWork),
    row('loss chunk', p.bytes.lossWork),
    row('gradient of one layer', p.bytes.dx),
    row('gradient checkpoints on the device', p.checkpoints.deviceBytes),
    row('gradient checkpoints in host RAM', p.checkpoints.hostBytes),
    row(`kept (${p.keep.layers} layers x ${p.keep.tokens}), device`, p.keep.deviceBytes),
    row(`kept (${p.keep.layers} layers x ${p.keep.tokens}), RAM`, p.keep.hostBytes),
    row('peak on the device', p.predictedPeak.device),
    row('peak in host RAM', p.predictedPeak.host),
    p.fits
      ? `fits; the longest that fits: ${p.maxTokens} tokens`
      : `does not fit: ${p.reasons.join('; ')}; the longest that fits: ${p.maxTokens} tokens`,
  ];
  process.stdout.write(`${lines.join('\n')}\n`);
}
