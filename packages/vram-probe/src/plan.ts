/** What a run takes, and the sizes that make it fit: arithmetic only, nothing is allocated. */
import { bytesPerRow } from '@lc/chunked-ce';
import { planStore } from '@lc/offload-ckpt';
import { LcTypeError, memInfo } from '@lc/tensor';
import { layerWorkBytes, openLoraBytes } from './layer-bytes.js';
import { modelWeights, trainableParameters } from './model-bytes.js';
import { ramInfo } from './ram.js';
import type { ModelShape } from './shape.js';
import { comparableSeconds } from './step-time.js';
import { storeBytes } from './store-bytes.js';
import type { Plan, PlanOptions } from './types.js';

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const SLACK = 1 << 16; // 256-byte alignment of what is counted in one sum here and allocated in parts
/**
 * A context with lc's kernels loaded and cuBLASLt's handle: 0.55 GiB seen on an H100 with driver 580. Behind it, from the pool: cuBLASLt's workspace of 32 MiB,
 * pieces of products cut along k (at most 17 MiB), and the pool's own rounding to 32 MiB.
 */
const CONTEXT_BYTES = 576 << 20;
const LIBRARY_BYTES = 128 << 20;

interface Budgets {
  vram: number;
  ram: number;
}

const amounts = [
  ...(['vramBudget', 'ramBudget', 'checkpointDeviceBytes', 'weightBytes', 'trainableParameters'] as const),
  ...(['adapterBytes', 'optimizerBytes', 'contextBytes'] as const),
] as const;

function check(o: PlanOptions): void {
  for (const [name, value] of [
    ...(['tokens', 'chunk', 'tile', 'lossChunk'] as const).map((key) => [key, o[key]] as const),
    ['layersPerSegment', o.layersPerSegment === 'auto' ? undefined : o.layersPerSegment] as const,
    ['lora.r', o.lora?.r] as const,
  ]) {
    if (value !== undefined && !(Number.isSafeInteger(value) && value >= 1)) {
      throw new LcTypeError('ERR_LC_ARGUMENT', `plan: ${name} must be a whole number >= 1, got ${String(value)}`);
    }
  }
  checkKeep(o.keep);
  for (const name of amounts) {
    const value = o[name];
    if (value !== undefined && !(value >= 0 && Number.isFinite(value))) {
      throw new LcTypeError('ERR_LC_ARGUMENT', `plan: ${name} must be a finite number >= 0, got ${String(value)}`);
    }
  }
}

function checkKeep(keep: PlanOptions['keep'] = 0): void {
  const amount = (n: unknown): boolean => Number.isSafeInteger(n) && (n as number) >= 0;
  if (keep === 'auto' || amount(keep) || (typeof keep === 'object' && amount(keep?.layers) && amount(keep?.tokens))) return;
  const got = typeof keep === 'object' && keep ? `{ layers: ${String(keep.layers)}, tokens: ${String(keep.tokens)} }` : String(keep);
  throw new LcTypeError(
    'ERR_LC_ARGUMENT',
    `plan: keep must be 'auto', a number of layers or { layers, tokens }, whole numbers >= 0, got ${got}`,
  );
}

interface Sizes {
  tokens: number;
  chunk: number;
  tile: number;
  lossChunk: number;
  layersPerSegment: number;
  keep: Keep;
}

/** Of how many layers, and of how many tokens of each, the last ones, the attention output is kept. */
interface Keep {
  layers: number;
  tokens: number;
}
const NOTHING: Keep = { layers: 0, tokens: 0 };

/** @param quick while searching: the same bytes without a list of every chunk */
function measure(o: PlanOptions, sizes: Sizes, budgets: Budgets, quick: boolean): Plan {
  const { tokens, chunk, tile, lossChunk, layersPerSegment, keep } = sizes;
  const m = o.model;
  const device = o.device ?? 'cpu';
  const activations = o.dtypes?.activations ?? (device === 'cuda' ? 'bf16' : 'f32');
  const act = activations === 'bf16' ? 2 : 4;
  const kvWidth = m.numKeyValueHeads * m.headDim;
  const trainable = o.trainableParameters ?? trainableParameters(m, o.lora);
  const weights = modelWeights(m, o.quantization ?? '4bit', act, o.dtypes?.weights ?? activations);
  const kv = 2 * tokens * kvWidth * act;
  const dkv = 2 * tokens * kvWidth * 4;
  const { dequantized, experts } = weights;
  const layer = { model: m, lora: o.lora, device, act, tokens, chunk, tile, deterministic: o.deterministic };
  const chunkWork = layerWorkBytes(layer) + openLoraBytes(layer) + SLACK;
  const lossWork =
    2 * Math.min(chunk, tokens) * m.hiddenSize * act + Math.min(lossChunk, chunk, tokens) * bytesPerRow(m.vocabSize, m.hiddenSize) + SLACK;
  const workspace = Math.max(kv + dkv + dequantized + chunkWork, lossWork);
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
    adapters: o.adapterBytes ?? trainable * 8,
    optimizer: o.optimizerBytes ?? Math.ceil(trainable * (o.optimBits === 8 ? 2.04 : 8)),
    context: device === 'cuda' ? (o.contextBytes ?? LIBRARY_BYTES + (o.vramBudget === undefined ? 0 : CONTEXT_BYTES)) : 0,
    sequence: tokens * 12,
  };
  const sum = fixed.weights + fixed.adapters + fixed.optimizer + fixed.context + fixed.sequence + workspace;
  const keptWidth = keptBytesPerToken(m, act);
  const keptStore = (onDevice: number) =>
    keep.layers === 0
      ? { checkpointsOnDevice: 0, checkpointsOnHost: 0, staging: 0 }
      : (quick ? storeBytes : planStore)({
          ...{ layers: keep.layers, tokens: keep.tokens, chunk, width: keptWidth, layersPerSegment: 1, dtype: 'u8', dx: 'none' },
          deviceBytes: onDevice,
        }).bytes;
  const everything = store(Number.POSITIVE_INFINITY);
  const keptAll = keep.layers * keep.tokens * keptWidth;
  const staging = { checkpoints: 4 * chunk * m.hiddenSize * act, kept: keep.layers > 0 ? 4 * Math.min(chunk, keep.tokens) * keptWidth : 0 };
  const left = budgets.vram - sum - everything.bytes.dx - everything.bytes.scratch;
  const room = device === 'cuda' ? Math.max(0, left - staging.checkpoints - staging.kept) : Number.POSITIVE_INFINITY;
  const s = store(o.checkpointDeviceBytes ?? Math.min(room, everything.bytes.checkpointsOnDevice));
  // What is left on the device: the kept outputs, all or in part.
  const rest = device === 'cuda' ? Math.max(0, left - s.bytes.checkpointsOnDevice - s.bytes.staging) : Number.POSITIVE_INFINITY;
  const kept = keptStore(rest >= keptAll ? keptAll : Math.max(0, rest - staging.kept));
  const deviceBytes = sum + s.bytes.device + kept.checkpointsOnDevice + kept.staging;
  const host = s.bytes.host + kept.checkpointsOnHost;
  const checkpoints = Math.ceil(m.numHiddenLayers / layersPerSegment) * m.hiddenSize * act;
  const reasons: string[] = [];
  if (device === 'cuda') {
    if (deviceBytes > budgets.vram) reasons.push(`VRAM: ${gib(deviceBytes)} needed, ${gib(budgets.vram)} to be had`);
    if (host > budgets.ram)
      reasons.push(`RAM: ${gib(host)} of gradient checkpoints${keep.layers > 0 ? ' and kept outputs' : ''}, ${gib(budgets.ram)} to be had`);
  } else if (deviceBytes + host > Math.min(budgets.vram, budgets.ram)) {
    reasons.push(`RAM: ${gib(deviceBytes + host)} needed, ${gib(Math.min(budgets.vram, budgets.ram))} to be had`);
  }
  return {
    tokens,
    chunk,
    tile,
    lossChunk,
    segment: layersPerSegment,
    checkpoints: { deviceBytes: s.bytes.checkpointsOnDevice, hostBytes: s.bytes.checkpointsOnHost },
    keep: { ...keep, deviceBytes: kept.checkpointsOnDevice, hostBytes: kept.checkpointsOnHost },
    bytes: {
      ...fixed,
      gradients: trainable * 4,
      dx: s.bytes.dx,
      scratch: s.bytes.scratch,
      staging: s.bytes.staging + kept.staging,
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
    predictedPeak: { device: deviceBytes, host },
    fits: reasons.length === 0,
    maxTokens: 0,
    reasons,
  };
}

/**
 * Sizes to try, large to small. Large tiles fill the experts' GEMMs: of gpt-oss-20b's MLP on an H100, tiles of 4,096 tokens took 1.16 of the time of 32,768, 8,192 took 1.06.
 * A loss chunk of about 1 GiB of logits gains nothing from more.
 */
const CHUNKS = { cpu: [1024, 512, 256, 128], cuda: [16384, 8192, 4096, 2048, 1024] } as const;
const TILES = { cpu: [1024, 512, 256, 128], cuda: [16384, 8192, 4096, 2048, 1024, 512] } as const;
const LOSS_BYTES = { cpu: 64 << 20, cuda: 1 << 30 } as const;

/** The device's usual size, and what to try when that is too much. */
function lossChunks(o: PlanOptions, tokens: number): number[] {
  if (o.lossChunk) return [o.lossChunk];
  const rows = Math.floor(LOSS_BYTES[o.device ?? 'cpu'] / bytesPerRow(o.model.vocabSize, o.model.hiddenSize));
  const largest = Math.max(1, Math.min(tokens, 4096, rows));
  return [1, 2, 4, 8].map((part) => Math.ceil(largest / part));
}

/** What a layer of `@lc/models` keeps of a token (`DecoderLayer.keepBytes`): attention output and log-sum-exp. */
const keptBytesPerToken = (m: ModelShape, act: number): number => Math.ceil((m.numAttentionHeads * (m.headDim * act + 4)) / 16) * 16;

/** What was asked to be kept, in whole chunks; 'auto': nothing, which is what takes least. */
function fixedKeep({ keep = 0, model }: PlanOptions, tokens: number, chunk: number): Keep {
  if (keep === 'auto') return NOTHING;
  const asked = typeof keep === 'number' ? { layers: keep, tokens } : keep;
  const layers = Math.min(layersToKeep(model), asked.layers);
  const kept = Math.min(tokens, tokens - Math.ceil((tokens - asked.tokens) / chunk) * chunk); // as the schedule does it
  return layers > 0 && kept > 0 ? { layers, tokens: kept } : NOTHING;
}
const layersToKeep = (m: ModelShape): number => m.fullAttentionLayers ?? m.numHiddenLayers;

/**
 * These sizes with as much kept as fits (`keep: 'auto'`), or with what was asked for; whether they fit at all is in the plan. The last tokens of a layer cost most to compute again, so the
 * last chunk of one layer after the other comes first, then the last two of every layer, and so on.
 */
function fullest(o: PlanOptions, sizes: Omit<Sizes, 'keep'>, budgets: Budgets): Plan {
  const { tokens, chunk } = sizes;
  const at = (keep: Keep): Plan => measure(o, { ...sizes, keep }, budgets, true);
  const nothing = at(fixedKeep(o, tokens, chunk)); // or what was asked for
  const layers = layersToKeep(o.model);
  if (o.keep !== 'auto' || !nothing.fits || layers === 0) return nothing;
  const chunks = Math.ceil(tokens / chunk);
  const last = (count: number): number => tokens - (chunks - count) * chunk;
  const step = (n: number): Keep => (n < layers ? { layers: n, tokens: last(1) } : { layers, tokens: last(n - layers + 1) });
  let [most, low, high] = [nothing, 0, layers + chunks]; // steps 1 .. layers + chunks - 1; more takes more
  while (high - low > 1) {
    const middle = (low + high) >>> 1;
    const p = at(step(middle));
    if (p.fits) [most, low] = [p, middle];
    else high = middle;
  }
  return most;
}

/** Of `comparableSeconds`: what smaller sizes have to gain. */
const LEAST_GAIN = 0.01;

/**
 * The fastest sizes that fit, as far as `comparableSeconds` tells: first fewer checkpoints on the device (`measure` gives them what is left, which costs nothing that is not hidden); then
 * smaller tiles, smaller chunks, fewer kept outputs or more layers per checkpoint (where the user permits it) give way to one another by what each costs. Larger sizes and fewer layers
 * per checkpoint stay where others would gain little.
 */
function best(o: PlanOptions, tokens: number, budgets: Budgets): Plan {
  const device = o.device ?? 'cpu';
  const losses = lossChunks(o, tokens);
  let [fastest, seconds]: [Plan | null, number] = [null, Number.POSITIVE_INFINITY];
  const segments = segmentChoices(o);
  for (const layersPerSegment of segments) {
    if (!least(o, tokens, budgets, layersPerSegment).fits) continue;
    for (const wanted of o.chunk ? [o.chunk] : CHUNKS[device]) {
      const chunk = Math.min(wanted, tokens);
      for (const tile of o.tile ? [o.tile] : TILES[device].filter((tile, i) => tile <= chunk || i === TILES[device].length - 1)) {
        for (const lossChunk of losses) {
          const p = fullest(o, { tokens, chunk, tile, layersPerSegment, lossChunk }, budgets);
          if (p.fits) {
            const takes = comparableSeconds(o.model, device, { tokens, chunk, tile, layersPerSegment, keep: p.keep });
            if (takes < seconds * (1 - LEAST_GAIN)) [fastest, seconds] = [p, takes];
            break;
          }
          if (p.bytes.lossWork < p.bytes.workspace) break; // a smaller loss chunk saves nothing
        }
      }
    }
  }
  if (!fastest) return least(o, tokens, budgets, segments.at(-1) as number);
  const { chunk, tile, lossChunk, segment: layersPerSegment, keep } = fastest;
  return measure(
    o,
    { tokens, chunk, tile, lossChunk, layersPerSegment, keep: { layers: keep.layers, tokens: keep.tokens } },
    budgets,
    false,
  );
}

const segmentChoices = (o: PlanOptions): number[] =>
  o.layersPerSegment === 'auto' ? [1, 2, 3, 4].filter((k) => k <= o.model.numHiddenLayers) : [o.layersPerSegment ?? 1];

/** The plan that takes least: what it does not fit, nothing does. */
function least(o: PlanOptions, tokens: number, budgets: Budgets, layersPerSegment: number): Plan {
  const device = o.device ?? 'cpu';
  const chunk = Math.min(tokens, o.chunk ?? (CHUNKS[device].at(-1) as number));
  const keep = fixedKeep(o, tokens, chunk);
  const tile = o.tile ?? (TILES[device].at(-1) as number);
  const lossChunk = lossChunks(o, tokens).at(-1) as number;
  return measure(o, { tokens, chunk, tile, lossChunk, layersPerSegment, keep }, budgets, true);
}

/**
 * A plan: chunk, tile and loss-chunk sizes, where the gradient checkpoints lie, and the predicted peak of what the process takes of the device, the CUDA context
 * and cuBLASLt included. Meant never to under-predict.
 *
 * @throws ERR_LC_ARGUMENT; asking for 'cuda' without a vramBudget asks the driver (ERR_LC_NO_DRIVER and its kin)
 */
export function plan(options: PlanOptions): Plan {
  check(options);
  const budgets: Budgets = {
    vram: options.vramBudget ?? (options.device === 'cuda' ? memInfo('cuda').freeBytes : freeRam()) * 0.9,
    ram: options.ramBudget ?? freeRam() * 0.9,
  };
  const p = best(options, options.tokens, budgets);
  if (options.maxTokens === false) return p;
  const fits = (tokens: number): boolean => segmentChoices(options).some((k) => least(options, tokens, budgets, k).fits);
  // Bytes grow with the length, so the longest that fits is found by bisection.
  let low = p.fits ? options.tokens : 0;
  let high = p.fits ? options.tokens * 2 : options.tokens;
  while (p.fits && high < 2 ** 34 && fits(high)) {
    low = high;
    high *= 2;
  }
  while (high - low > Math.max(1, low >> 10)) {
    const middle = Math.floor((low + high) / 2);
    if (middle >= 1 && fits(middle)) low = middle;
    else high = middle;
  }
  return { ...p, reasons: p.fits ? [] : [...p.reasons, ...remedies(options, p, budgets)], maxTokens: low };
}

/** What would make it fit, where a setting would. */
function remedies(o: PlanOptions, p: Plan, budgets: Budgets): string[] {
  for (const layersPerSegment of [2, 3, 4]) {
    if (o.layersPerSegment === 'auto' || layersPerSegment <= p.segment || layersPerSegment > o.model.numHiddenLayers) continue;
    if (least(o, o.tokens, budgets, layersPerSegment).fits) return [`it would fit with layersPerSegment: ${layersPerSegment}`];
  }
  return [];
}

const freeRam = (): number => Math.min(memInfo('cpu').freeBytes, ramInfo().availableBytes);
