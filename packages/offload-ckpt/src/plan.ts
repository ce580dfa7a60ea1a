/** Arithmetic of chunks, segments and tiers. Nothing here touches memory, so a planner can ask "what would it take?" first. */
import { type DType, dtypeBytes, LcError, LcTypeError, type Span, type Tensor } from '@lc/tensor';

/** Memory of the workspace's device, or of the host: pinned where CUDA is. */
export type Tier = 'device' | 'host';

/** What a store is for, and what it may take. */
export interface StoreShape {
  /** Number of layers. */
  layers: number;
  /** Longest sequence, in tokens. */
  tokens: number;
  /** Tokens per chunk (the last chunk may be shorter). */
  chunk: number;
  /** Elements per token. */
  width: number;
  /** A checkpoint every so many layers; the layers between are recomputed into scratch, segment by segment. Default 1. */
  layersPerSegment?: number;
  /** dtype of activations. Default f32. */
  dtype?: DType;
  /** Bytes of checkpoints kept on the device; the last segments' come first. Default: all. */
  deviceBytes?: number;
  /** Most bytes to take of host memory. Default: no limit. */
  hostBytes?: number;
  /** Where the gradient of one layer, [tokens, width], lies; 'none' for a store of checkpoints alone. Default 'device'. */
  dx?: Tier | 'none';
  /** Where the (layersPerSegment - 1) x [tokens, width] of recomputed layer inputs lie. Default 'device'. */
  scratch?: Tier;
  /** Device slots of [chunk, width] through which host-tier data passes. Default: 4, plus 2 when dx or scratch is on the host; 0 when nothing is. */
  stagingSlots?: number;
}

/** Where every checkpoint lies, and how many bytes each kind takes. */
export interface StorePlan {
  segments: number;
  chunks: number;
  layersPerSegment: number;
  dtype: DType;
  stagingSlots: number;
  /** Tier of every checkpoint: `tiers[segment][chunk]`. */
  tiers: Tier[][];
  /** Bytes, exactly as they will be allocated. */
  bytes: {
    checkpointsOnDevice: number;
    checkpointsOnHost: number;
    dx: number;
    scratch: number;
    staging: number;
    /** Sums. */
    device: number;
    host: number;
  };
}

const isCount = (n: unknown): n is number => Number.isSafeInteger(n) && (n as number) >= 1;

export function requireCount(op: string, name: string, value: unknown): asserts value is number {
  if (!isCount(value)) throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: ${name} must be a whole number >= 1, got ${String(value)}`);
}

function budget(name: string, value: number | undefined): number {
  const bytes = value ?? Number.POSITIVE_INFINITY;
  if (typeof bytes !== 'number' || Number.isNaN(bytes) || bytes < 0) {
    throw new LcTypeError('ERR_LC_ARGUMENT', `ActivationStore: ${name} must be a number of bytes >= 0, got ${String(value)}`);
  }
  return bytes;
}

/** Tokens of chunk `c` of a sequence of `tokens`. */
export const chunkLength = (tokens: number, chunk: number, c: number): number => Math.max(0, Math.min(chunk, tokens - c * chunk));

/**
 * Which checkpoint lies where, and the bytes of every part.
 * @throws LcTypeError ERR_LC_ARGUMENT for sizes that are no counts; LcError ERR_LC_PLAN when the two budgets cannot hold it
 */
export function planStore(options: StoreShape): StorePlan {
  for (const name of ['layers', 'tokens', 'chunk', 'width'] as const) requireCount('ActivationStore', name, options[name]);
  const { layers, tokens, chunk, width, layersPerSegment = 1, dtype = 'f32', dx = 'device', scratch = 'device' } = options;
  requireCount('ActivationStore', 'layersPerSegment', layersPerSegment);
  for (const [name, tier] of [
    ['dx', dx],
    ['scratch', scratch],
  ] as const) {
    if (tier !== 'device' && tier !== 'host' && !(name === 'dx' && tier === 'none'))
      throw new LcTypeError('ERR_LC_ARGUMENT', `ActivationStore: ${name} must be 'device' or 'host', got ${String(tier)}`);
  }
  const segments = Math.ceil(layers / layersPerSegment);
  const chunks = Math.ceil(tokens / chunk);
  const tokenBytes = width * dtypeBytes[dtype];
  const rowBytes = tokens * tokenBytes;

  // Backward needs the last segments first, so those stay; inside a segment it reads chunk 0 first.
  let left = budget('deviceBytes', options.deviceBytes);
  const tiers: Tier[][] = Array.from({ length: segments }, () => []);
  let checkpointsOnDevice = 0;
  for (let s = segments - 1; s >= 0; s--) {
    for (let c = 0; c < chunks; c++) {
      const bytes = chunkLength(tokens, chunk, c) * tokenBytes;
      const keep = bytes <= left;
      left = keep ? left - bytes : 0; // once one does not fit, all earlier-written ones go to the host: tiers stay contiguous
      if (keep) checkpointsOnDevice += bytes;
      (tiers[s] as Tier[]).push(keep ? 'device' : 'host');
    }
  }
  const checkpointsOnHost = segments * rowBytes - checkpointsOnDevice;
  const scratchRows = Math.min(layersPerSegment, layers) - 1;
  const scratchBytes = scratchRows * rowBytes;
  const hostExtra = dx === 'host' || (scratch === 'host' && scratchRows > 0);
  const anyHost = checkpointsOnHost > 0 || hostExtra;
  const stagingSlots = anyHost ? (options.stagingSlots ?? (hostExtra ? 6 : 4)) : 0;
  if (anyHost && !(Number.isSafeInteger(stagingSlots) && stagingSlots >= 2)) {
    throw new LcTypeError(
      'ERR_LC_ARGUMENT',
      `ActivationStore: stagingSlots must be a whole number >= 2 (one to read, one to write), got ${stagingSlots}`,
    );
  }
  const staging = stagingSlots * Math.min(chunk, tokens) * tokenBytes;
  const host = checkpointsOnHost + (dx === 'host' ? rowBytes : 0) + (scratch === 'host' ? scratchBytes : 0);
  const hostLimit = budget('hostBytes', options.hostBytes);
  if (host > hostLimit) {
    throw new LcError(
      'ERR_LC_PLAN',
      `ActivationStore: ${segments} checkpoints of ${tokens} tokens x ${tokenBytes} bytes need ${host} bytes of host memory beside ${checkpointsOnDevice} on the device, ` +
        `but hostBytes is ${hostLimit}; raise deviceBytes or hostBytes, raise layersPerSegment (now ${layersPerSegment}), or shorten the sequence`,
    );
  }
  return {
    segments,
    chunks,
    layersPerSegment,
    dtype,
    stagingSlots,
    tiers,
    bytes: {
      checkpointsOnDevice,
      checkpointsOnHost,
      dx: dx === 'none' ? 0 : rowBytes,
      scratch: scratchBytes,
      staging,
      device: checkpointsOnDevice + staging + (dx === 'device' ? rowBytes : 0) + (scratch === 'device' ? scratchBytes : 0),
      host,
    },
  };
}

/** Cuts a sequence into spans of `chunk` tokens, the last one shorter. */
export function makeSpans(tokens: number, chunk: number, docStart: Tensor | null, dropoutSeed?: number): Span[] {
  const spans: Span[] = [];
  for (let start = 0; start < tokens; start += chunk) {
    const length = Math.min(chunk, tokens - start);
    const base = { start, length, docStart: docStart ? docStart.rows(start, length) : null };
    spans.push(dropoutSeed === undefined ? base : { ...base, dropoutSeed });
  }
  return spans;
}
