/** What a run takes, and the sizes that make it fit: arithmetic only, nothing is allocated. */
import { attentionWorkspaceBytes } from '@lc/attention';
import { bytesPerRow } from '@lc/chunked-ce';
import { planStore } from '@lc/offload-ckpt';
import { LcTypeError, memInfo } from '@lc/tensor';
import type { ModelShape } from './shape.js';

export interface PlanOptions {
  model: ModelShape;
  /** Sequence length. */
  tokens: number;
  /** Default 'cpu'. */
  device?: 'cpu' | 'cuda';
  /** Bytes of device memory; default 90% of what is free now. On the CPU, device and host memory are both RAM. */
  vramBudget?: number;
  /** Bytes of host memory; default 90% of what is free now. */
  ramBudget?: number;
  /** Trained elements. Default: LoRA of rank 16 on q, k, v, o. */
  trainableParameters?: number;
  /** Bytes of the base weights. Default: 4 bits for linears and experts, the activations' dtype for embedding and head. 0 when they are loaded already. */
  weightBytes?: number;
  optimBits?: 8 | 32;
  layersPerSegment?: number;
  /** Fix a size instead of choosing it. */
  chunk?: number;
  tile?: number;
  lossChunk?: number;
  checkpointDeviceBytes?: number;
}

export interface Plan {
  tokens: number;
  /** Tokens per chunk of the layers x chunks schedule, per MLP tile, and rows of logits alive at once. */
  chunk: number;
  tile: number;
  lossChunk: number;
  checkpoints: { deviceBytes: number; hostBytes: number };
  /** Every part, in bytes. `workspace` holds kv, dkv, dequantized weights, and the larger of a chunk's working set and the loss's. */
  bytes: {
    weights: number;
    adapters: number;
    optimizer: number;
    sequence: number;
    dx: number;
    scratch: number;
    staging: number;
    workspace: number;
    kv: number;
    dkv: number;
    dequantized: number;
    chunkWork: number;
    lossWork: number;
  };
  /** What one more token takes, at fixed chunk, tile, loss chunk and tiers: device without checkpoints; checkpoints wherever they lie. */
  perToken: { device: number; checkpoints: number };
  predictedPeak: { device: number; host: number };
  fits: boolean;
  /** The longest sequence that fits; 0 when none does. */
  maxTokens: number;
  /** Which budget is exceeded, and by what. */
  reasons: string[];
}

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const SLACK = 1 << 16; // 256-byte alignment of each workspace allocation

interface Budgets {
  vram: number;
  ram: number;
}

function check(o: PlanOptions): void {
  for (const name of ['tokens', 'chunk', 'tile', 'lossChunk', 'layersPerSegment'] as const) {
    const value = o[name];
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
function chunkBytes(m: ModelShape, act: number, chunk: number, tile: number, start: number): number {
  const qWidth = m.numAttentionHeads * m.headDim;
  const kvWidth = m.numKeyValueHeads * m.headDim;
  const rows = Math.min(tile, chunk);
  const attention = attentionWorkspaceBytes({
    tokens: chunk,
    heads: m.numAttentionHeads,
    kvHeads: m.numKeyValueHeads,
    headDim: m.headDim,
    start,
    window: null,
  });
  // attn, lse, normed, q (and q before its norm) live through both halves.
  const shared = chunk * (act * (3 * qWidth + m.hiddenSize) + 4 * m.numAttentionHeads);
  const routed = m.numExperts > 0 ? rows * m.numExpertsPerTok : rows;
  // Per routed row: x, d(out), gate and up, activation, and the gradients of the last three.
  const mlp =
    act * (chunk * m.hiddenSize + rows * 4 * m.hiddenSize + routed * (3 * m.hiddenSize + 8 * m.intermediateSize)) +
    rows * 16 * (m.numExperts + m.numExpertsPerTok);
  const attentionHalf = chunk * act * (2 * qWidth + 3 * kvWidth + m.hiddenSize) + Math.max(attention.forward, attention.backward);
  // Low-rank intermediates and dropout masks of a LoRA beside the widest input.
  const lora = chunk * act * (Math.max(qWidth, m.hiddenSize) + 256);
  return shared + Math.max(mlp, attentionHalf) + lora + SLACK;
}

function measure(o: PlanOptions, tokens: number, chunk: number, tile: number, lossChunk: number, budgets: Budgets): Plan {
  const m = o.model;
  const act = o.device === 'cuda' ? 2 : 4;
  const qWidth = m.numAttentionHeads * m.headDim;
  const kvWidth = m.numKeyValueHeads * m.headDim;
  const attentionWeights = m.hiddenSize * (2 * qWidth + 2 * kvWidth);
  const mlpWeights = 3 * m.hiddenSize * m.intermediateSize * Math.max(1, m.numExperts);
  const trainable = o.trainableParameters ?? m.numHiddenLayers * 16 * (2 * m.hiddenSize + 2 * qWidth + 2 * (m.hiddenSize + kvWidth));
  const embeddings = m.vocabSize * m.hiddenSize * (m.tieWordEmbeddings ? 1 : 2) * act;
  const kv = 2 * tokens * kvWidth * act;
  const dkv = 2 * tokens * kvWidth * 4;
  const dequantized = (attentionWeights + mlpWeights) * act;
  const chunkWork = chunkBytes(m, act, Math.min(chunk, tokens), tile, 0);
  const lossWork =
    2 * Math.min(chunk, tokens) * m.hiddenSize * act + Math.min(lossChunk, chunk, tokens) * bytesPerRow(m.vocabSize, m.hiddenSize) + SLACK;
  const workspace = Math.max(kv + dkv + dequantized + chunkWork, lossWork);
  const layersPerSegment = o.layersPerSegment ?? 1;
  const store = (deviceBytes: number) =>
    planStore({
      layers: m.numHiddenLayers,
      tokens,
      chunk,
      width: m.hiddenSize,
      layersPerSegment,
      dtype: act === 4 ? 'f32' : 'bf16',
      deviceBytes,
    });

  const fixed = {
    weights: o.weightBytes ?? embeddings + Math.ceil((attentionWeights + mlpWeights) * m.numHiddenLayers * 0.54),
    adapters: trainable * 8,
    optimizer: trainable * (o.optimBits === 8 ? 2.04 : 8),
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
    checkpoints: { deviceBytes: s.bytes.checkpointsOnDevice, hostBytes: s.bytes.checkpointsOnHost },
    bytes: {
      ...fixed,
      dx: s.bytes.dx,
      scratch: s.bytes.scratch,
      staging: s.bytes.staging,
      workspace,
      kv,
      dkv,
      dequantized,
      chunkWork,
      lossWork,
    },
    perToken: {
      device: 2 * kvWidth * (act + 4) + m.hiddenSize * act + 12,
      checkpoints: Math.ceil(m.numHiddenLayers / layersPerSegment) * m.hiddenSize * act,
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

function best(o: PlanOptions, tokens: number, budgets: Budgets): Plan {
  const device = o.device ?? 'cpu';
  const tile = o.tile ?? 1024;
  const lossChunk =
    o.lossChunk ?? Math.max(1, Math.min(tokens, 4096, Math.floor(LOSS_BYTES[device] / bytesPerRow(o.model.vocabSize, o.model.hiddenSize))));
  const chunks = o.chunk ? [o.chunk] : chunkChoices[device];
  let smallest: Plan | undefined;
  for (const chunk of chunks) {
    const p = measure(o, tokens, Math.min(chunk, tokens), tile, lossChunk, budgets);
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
    vram: options.vramBudget ?? memInfo(options.device === 'cuda' ? 'cuda' : 'cpu').freeBytes * 0.9,
    ram: options.ramBudget ?? memInfo('cpu').freeBytes * 0.9,
  };
  const p = best(options, options.tokens, budgets);
  // Bytes grow with the length, so the longest that fits is found by bisection.
  let low = p.fits ? options.tokens : 0;
  let high = p.fits ? options.tokens * 2 : options.tokens;
  while (p.fits && high < 2 ** 34 && best(options, high, budgets).fits) {
    low = high;
    high *= 2;
  }
  while (high - low > Math.max(1, low >> 10)) {
    const middle = Math.floor((low + high) / 2);
    if (middle >= 1 && best(options, middle, budgets).fits) low = middle;
    else high = middle;
  }
  return { ...p, maxTokens: low };
}
