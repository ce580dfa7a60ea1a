import { copy, type DeviceLike, empty, LcTypeError, type Parameter, type Scope, zeros } from '@lc/tensor';
import { native } from './native.js';

/** What LoRA and PEFT call them. */
export interface LoraOptions {
  /** Rank. */
  r: number;
  /** The update is scaled by loraAlpha / r (rsLoRA: / sqrt(r)). Default r, a scale of 1. */
  loraAlpha?: number;
  /** Rank-stabilised scaling (Kalajdzievski, 2023). Default false. */
  useRslora?: boolean;
  /** Share of the inputs of lora_A that is dropped in training, in [0, 1). Default 0. */
  loraDropout?: number;
  /** Of the initial lora_A. Default 0. */
  seed?: number;
  /** Where the parameters live. Default 'cpu'. */
  device?: DeviceLike;
  /**
   * The module as PEFT names it, e.g. `base_model.model.model.layers.0.self_attn.q_proj`: the parameters are called `<name>.lora_A.weight` and
   * `<name>.lora_B.weight`. It also selects the random numbers, so give every module its own.
   */
  name: string;
}

/** What the update is multiplied by: loraAlpha / r (Hu et al., 2021), with rsLoRA loraAlpha / sqrt(r) (Kalajdzievski, 2023). */
export function loraScale(options: Pick<LoraOptions, 'r' | 'loraAlpha' | 'useRslora'>): number {
  const { r, loraAlpha = r, useRslora = false } = options;
  return loraAlpha / (useRslora ? Math.sqrt(r) : r);
}

/** A 32-bit number for a name (FNV-1a): which stream of random numbers a module draws from. */
export function siteOf(name: string): number {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(name)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash;
}

export function checkLora(op: string, options: LoraOptions): void {
  const { r, loraAlpha = r, loraDropout = 0, seed = 0 } = options;
  const fail = (what: string, got: unknown): never => {
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op} '${options.name}': ${what}, got ${String(got)}`);
  };
  if (!Number.isInteger(r) || r < 1) fail('r must be a whole number >= 1 (8 to 64 is usual)', r);
  if (!Number.isFinite(loraAlpha) || loraAlpha === 0) fail('loraAlpha must be a finite number other than 0 (r or 2 r is usual)', loraAlpha);
  if (!(loraDropout >= 0 && loraDropout < 1)) fail('loraDropout must be in [0, 1)', loraDropout);
  checkSeed(op, seed);
}

export function checkSeed(op: string, seed: number): void {
  if (!Number.isSafeInteger(seed) || seed < 0)
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: seed must be a whole number from 0 to 2^53 - 1, got ${seed}`);
}

/**
 * lora_A [rows, in] from PEFT's initialisation (Kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), lora_B zero; gradients zero. All f32, owned by
 * `scope`.
 */
export function makeLoraParameters(
  scope: Scope,
  options: LoraOptions,
  rows: number,
  inFeatures: number,
  outFeatures: number,
): { a: Parameter; b: Parameter } {
  const device = options.device ?? 'cpu';
  const parameter = (suffix: string, shape: [number, number], make: typeof empty): Parameter => ({
    name: `${options.name}.${suffix}.weight`,
    value: scope.own(make(shape, { label: 'lora', device })),
    grad: scope.own(zeros(shape, { label: 'lora.grad', device })),
  });
  const a = parameter('lora_A', [rows, inFeatures], empty);
  const b = parameter('lora_B', [outFeatures, rows], zeros);
  const bound = 1 / Math.sqrt(inFeatures);
  // Drawn on the CPU: the same adapter on every device.
  using drawn = empty([rows, inFeatures], { label: 'lora' });
  native().uniform({ out: drawn, seed: options.seed ?? 0, site: siteOf(a.name), low: -bound, high: bound });
  copy(a.value, drawn);
  return { a, b };
}
