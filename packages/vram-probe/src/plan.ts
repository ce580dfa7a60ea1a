/** What a run takes, and the sizes that make it fit: arithmetic only, nothing is allocated. */
import { attentionWorkspaceBytes } from '@lc/attention';
import { bytesPerRow } from '@lc/chunked-ce';
import { planStore } from '@lc/offload-ckpt';
import { LcTypeError, memInfo } from '@lc/tensor';
import { expertLoraBytes, modelWeights, trainableParameters } from './model-bytes.js';
import { ramInfo } from './ram.js';
import { storeBytes } from './store-bytes.js';
import type { Plan, PlanOptions } from './types.js';

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const SLACK = 1 << 16; // 256-byte alignment of each workspace allocation

interface Budgets {
  vram: number;
  ram: number;
}

function check(o: PlanOptions): void {
  for (const [name, value] of [
    ...(['tokens', 'chunk', 'tile', 'lossChunk', 'layersPerSegment'] as const).map((key) => [key, o[key]] as const),
    ['lora.r', o.lora?.r] as const,
  ]) {
    if (value !== undefined && !(Number.isSafeInteger(value) && value >= 1)) {
      throw new LcTypeError('ERR_LC_ARGUMENT', `plan: ${name} must be a whole number >= 1, got ${String(value)}`);
    }
  }
  for (const name of ['vramBudget', 'ramBudget', 'checkpointDeviceBytes', 'weightBytes', 'trainableParameters'] as const) {
    const value = o[name];
    if (value !== undefined && !(value >= 0 && Number.isFinite(value))) {
      throw new LcTypeError('ERR_LC_ARGUMENT', `plan: ${name} must be a finite number >= 0, got ${String(value)}`);
    }
  }
}

/** Bytes of one chunk's forward and backward beyond K, V, dK, dV and weights: the larger of the attention half and the MLP half of backward. */
function chunkBytes(o: PlanOptions, act: number, tokens: number, chunk: number, tile: number): number {
  const m = o.model;
  const qWidth = m.numAttentionHeads * m.headDim;
  const kvWidth = m.numKeyValueHeads * m.headDim;
  const rows = Math.min(tile, chunk);
  const shape = {
    ...{ heads: m.numAttentionHeads, kvHeads: m.numKeyValueHeads, headDim: m.headDim, window: null },
    ...{ tokens: chunk, start: tokens - chunk }, // the last chunk sees the most keys, and takes the most scratch
    device: o.device ?? 'cpu',
  };
  const attention = attentionWorkspaceBytes(shape);
  // attn, lse, normed, q (and q before its norm) live through both halves.
  const shared = chunk * (act * (3 * qWidth + m.hiddenSize) + 4 * m.numAttentionHeads);
  const routed = m.numExperts > 0 ? rows * m.numExpertsPerTok : rows;
  // Per routed row: x, d(out), gate and up, activation, and the gradients of the last three.
  const mlp =
    act * (chunk * m.hiddenSize + rows * 4 * m.hiddenSize + routed * (3 * m.hiddenSize + 8 * m.intermediateSize)) +
    rows * 16 * (m.numExperts + m.numExpertsPerTok);
  const attentionHalf = chunk * act * (2 * qWidth + 3 * kvWidth + m.hiddenSize) + Math.max(attention.forward, attention.backward);
  // Low-rank intermediates and dropout masks of a LoRA beside the widest input.
  const lora = chunk * (act * Math.max(qWidth, m.hiddenSize) + Math.max(256 * act, 8 * (o.lora?.r ?? 16)));
  return shared + Math.max(mlp, attentionHalf) + lora + expertLoraBytes(m, o.lora, routed) + SLACK;
}

interface Sizes {
  tokens: number;
  chunk: number;
  tile: number;
  lossChunk: number;
}

function measure(o: PlanOptions, { tokens, chunk, tile, lossChunk }: Sizes, budgets: Budgets, quick: boolean): Plan {
  const m = o.model;
  const activations = o.dtypes?.activations ?? (o.device === 'cuda' ? 'bf16' : 'f32');
  const act = activations === 'bf16' ? 2 : 4;
  const kvWidth = m.numKeyValueHeads * m.headDim;
  const trainable = o.trainableParameters ?? trainableParameters(m, o.lora);
  const weights = modelWeights(m, o.quantization ?? '4bit', act, o.dtypes?.weights ?? activations);
  const kv = 2 * tokens * kvWidth * act;
  const dkv = 2 * tokens * kvWidth * 4;
  const { dequantized, experts } = weights;
  const chunkWork = chunkBytes(o, act, tokens, Math.min(chunk, tokens), tile);
  const lossWork =
    2 * Math.min(chunk, tokens) * m.hiddenSize * act + Math.min(lossChunk, chunk, tokens) * bytesPerRow(m.vocabSize, m.hiddenSize) + SLACK;
  const workspace = Math.max(kv + dkv + dequantized + chunkWork, lossWork);
  const layersPerSegment = o.layersPerSegment ?? 1;
  const store = (deviceBytes: number) =>
    (quick ? storeBytes : planStore)({
      layers: m.numHiddenLayers,
      tokens,
      chunk,
      width: m.hiddenSize,
      layersPerSegment,
      dtype: activations,
      deviceBytes,
    });

  const fixed = {
    weights: o.weightBytes ?? weights.bytes,
    adapters: trainable * 8,
    optimizer: Math.ceil(trainable * (o.optimBits === 8 ? 2.04 : 8)),
    sequence: tokens * 12,
  };
  const sum = fixed.weights + fixed.adapters + fixed.optimizer + fixed.sequence + workspace;
  const everything = store(Number.POSITIVE_INFINITY);
  const room =
    o.device === 'cuda'
      ? Math.max(0, budgets.vram - sum - everything.bytes.dx - everything.bytes.scratch - 4 * chunk * m.hiddenSize * act)
      : Number.POSITIVE_INFINITY;
  const s = store(o.checkpointDeviceBytes ?? Math.min(room, everything.bytes.checkpointsOnDevice));
  const device = sum + s.bytes.device;
  const host = s.bytes.host;
  const checkpoints = Math.ceil(m.numHiddenLayers / layersPerSegment) * m.hiddenSize * act;
  const reasons: string[] = [];
  if (o.device === 'cuda') {
    if (device > budgets.vram) reasons.push(`VRAM: ${gib(device)} needed, ${gib(budgets.vram)} to be had`);
    if (host > budgets.ram) reasons.push(`RAM: ${gib(host)} of gradient checkpoints, ${gib(budgets.ram)} to be had`);
  } else if (device + host > Math.min(budgets.vram, budgets.ram)) {
    reasons.push(`RAM: ${gib(device + host)} needed, ${gib(Math.min(budgets.vram, budgets.ram))} to be had`);
  }
  return {
    tokens,
    chunk,
    tile,
    lossChunk,
    segment: layersPerSegment,
    checkpoints: { deviceBytes: s.bytes.checkpointsOnDevice, hostBytes: s.bytes.checkpointsOnHost },
    bytes: {
      ...fixed,
      gradients: trainable * 4,
      dx: s.bytes.dx,
      scratch: s.bytes.scratch,
      staging: s.bytes.staging,
      workspace,
      kv,
      dkv,
      dequantized,
      experts,
      chunkWork,
      lossWork,
    },
    perToken: {
      device: 2 * kvWidth * (act + 4) + Math.min(layersPerSegment, m.numHiddenLayers) * m.hiddenSize * act + 12, // dx and scratch
      checkpoints,
      host: o.checkpointDeviceBytes !== undefined || host > 0 ? checkpoints : 0,
    },
    predictedPeak: { device, host },
    fits: reasons.length === 0,
    maxTokens: 0,
    reasons,
  };
}

/** Sizes to try, large to small. */
const chunkChoices = { cpu: [1024, 512, 256, 128], cuda: [16384, 8192, 4096, 2048, 1024] } as const;
const LOSS_BYTES = { cpu: 64 << 20, cuda: 1 << 30 } as const;

/** @param quick while searching: the same sizes without a list of every chunk */
function best(o: PlanOptions, tokens: number, budgets: Budgets, quick: boolean): Plan {
  const device = o.device ?? 'cpu';
  const tile = o.tile ?? 1024;
  const lossChunk =
    o.lossChunk ?? Math.max(1, Math.min(tokens, 4096, Math.floor(LOSS_BYTES[device] / bytesPerRow(o.model.vocabSize, o.model.hiddenSize))));
  const chunks = o.chunk ? [o.chunk] : chunkChoices[device];
  let smallest: Plan | undefined;
  for (const chunk of chunks) {
    const p = measure(o, { tokens, chunk: Math.min(chunk, tokens), tile, lossChunk }, budgets, quick);
    if (p.fits) return p;
    smallest = p;
  }
  return smallest as Plan;
}

/**
 * A first plan: chunk, tile and loss-chunk sizes, where the gradient checkpoints lie, and the predicted peak of lc's allocations. Meant never to
 * under-predict; a CUDA context and cuBLAS are not part of it.
 *
 * @throws ERR_LC_ARGUMENT; asking for 'cuda' without a vramBudget asks the driver (ERR_LC_NO_DRIVER and its kin)
 */
export function plan(options: PlanOptions): Plan {
  check(options);
  const budgets: Budgets = {
    vram: options.vramBudget ?? (options.device === 'cuda' ? memInfo('cuda').freeBytes : freeRam()) * 0.9,
    ram: options.ramBudget ?? freeRam() * 0.9,
  };
  const p = best(options, options.tokens, budgets, false);
  // Bytes grow with the length, so the longest that fits is found by bisection.
  let low = p.fits ? options.tokens : 0;
  let high = p.fits ? options.tokens * 2 : options.tokens;
  while (p.fits && high < 2 ** 34 && best(options, high, budgets, true).fits) {
    low = high;
    high *= 2;
  }
  while (high - low > Math.max(1, low >> 10)) {
    const middle = Math.floor((low + high) / 2);
    if (middle >= 1 && best(options, middle, budgets, true).fits) low = middle;
    else high = middle;
  }
  return { ...p, reasons: p.fits ? [] : [...p.reasons, ...remedies(options, p, budgets)], maxTokens: low };
}

/** What would make it fit, where a setting would. */
function remedies(o: PlanOptions, p: Plan, budgets: Budgets): string[] {
  for (const layersPerSegment of [2, 3, 4]) {
    if (layersPerSegment <= p.segment || layersPerSegment > o.model.numHiddenLayers) continue;
    if (best({ ...o, layersPerSegment }, o.tokens, budgets, true).fits) return [`it would fit with layersPerSegment: ${layersPerSegment}`];
  }
  return [];
}

const freeRam = (): number => Math.min(memInfo('cpu').freeBytes, ramInfo().availableBytes);
