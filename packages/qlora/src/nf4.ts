import { copy, type DeviceLike, empty, emptyLike, LcError, LcTypeError, Scope, type Tensor } from '@lc/tensor';
import { native } from './native.js';
import { checkOut, type WeightStorage } from './weights.js';

const SCALES_PER_BLOCK = 256;

/** Tensors of an NF4 weight, for saving and loading. With double quantization `absmax` is null and the other four are there. */
export interface Nf4Parts {
  /** u8 [ceil(n / 2)]: two codes a byte, the first element in the high nibble. */
  codes: Tensor;
  /** f32 [ceil(n / blockSize)] */
  absmax: Tensor | null;
  /** u8 [ceil(n / blockSize)]: absmax - offset in the signed dynamic map, by blocks of 256 */
  absmaxCodes: Tensor | null;
  /** f32 [ceil(blocks / 256)] */
  absmaxScales: Tensor | null;
  /** f32 [1]: the mean of absmax */
  absmaxOffset: Tensor | null;
}

/** Blocks and scales of a quantization. */
export interface Nf4Options {
  /** Elements that share a scale; a power of two from 32 to 4096. Default 64. */
  blockSize?: number;
  /** Quantize the scales too (0.37 bits per weight less). Default true. */
  doubleQuant?: boolean;
  /** For `memory()`. Default 'nf4'. */
  label?: string;
}

/**
 * 4-bit NormalFloat with optional double quantization, after QLoRA (Dettmers et al., 2023) and bitsandbytes' documentation of its layout: 4.5 bits
 * per weight, 4.127 with double quantization. Blocks run over the flattened, row-major tensor. Not yet compared with bitsandbytes itself.
 */
export class Nf4Weight implements WeightStorage {
  readonly format = 'nf4';
  readonly nbytes: number;

  private constructor(
    readonly shape: readonly number[],
    readonly blockSize: number,
    readonly parts: Nf4Parts,
    private readonly scope: Scope,
  ) {
    this.nbytes = Object.values(parts).reduce((sum, t: Tensor | null) => sum + (t?.nbytes ?? 0), 0);
  }

  /**
   * Quantizes `x` (f32, bf16 or f16, contiguous, on the CPU).
   * @throws ERR_LC_NAN when a value is not finite, ERR_LC_ARGUMENT, ERR_LC_DTYPE, ERR_LC_STRIDES
   */
  static quantize(x: Tensor, options: Nf4Options = {}): Nf4Weight {
    const { blockSize = 64, doubleQuant = true, label = 'nf4' } = options;
    checkBlock('Nf4Weight.quantize', blockSize);
    const blocks = Math.ceil(x.numel / blockSize);
    const scope = new Scope();
    try {
      const codes = scope.own(empty([Math.ceil(x.numel / 2)], { dtype: 'u8', label }));
      using scales = new Scope();
      const absmax = scales.own(empty([blocks], { label }));
      if (!native().nf4Quantize({ x, codes, absmax, block: blockSize })) {
        throw new LcError('ERR_LC_NAN', `Nf4Weight.quantize: ${x} holds NaN or infinity; check the checkpoint it came from`);
      }
      const parts: Nf4Parts = { codes, absmax: null, absmaxCodes: null, absmaxScales: null, absmaxOffset: null };
      if (doubleQuant) {
        parts.absmaxCodes = scope.own(empty([blocks], { dtype: 'u8', label }));
        parts.absmaxScales = scope.own(empty([Math.ceil(blocks / SCALES_PER_BLOCK)], { label }));
        parts.absmaxOffset = scope.own(empty([1], { label }));
        native().doubleQuantize({ absmax, codes: parts.absmaxCodes, scales: parts.absmaxScales, offset: parts.absmaxOffset });
      } else {
        parts.absmax = scope.own(scales.move(absmax));
      }
      return new Nf4Weight(x.shape.slice(), blockSize, parts, scope);
    } catch (error) {
      scope.dispose();
      throw error;
    }
  }

  /** Takes over tensors that were quantized before. @throws ERR_LC_SHAPE */
  static fromParts(shape: readonly number[], parts: Nf4Parts, options: { blockSize?: number } = {}): Nf4Weight {
    const blockSize = options.blockSize ?? 64;
    checkBlock('Nf4Weight.fromParts', blockSize);
    const n = shape.reduce((a, b) => a * b, 1);
    const blocks = Math.ceil(n / blockSize);
    const { codes, absmax, absmaxCodes, absmaxScales, absmaxOffset } = parts;
    const want = (name: string, t: Tensor | null, dtype: string, size: number): void => {
      if (t?.dtype !== dtype || t.numel !== size)
        throw new LcTypeError('ERR_LC_SHAPE', `Nf4Weight.fromParts: ${name} must be ${dtype}[${size}] for shape [${shape}], got ${t}`);
    };
    want('codes', codes, 'u8', Math.ceil(n / 2));
    if (absmax) want('absmax', absmax, 'f32', blocks);
    else {
      want('absmaxCodes', absmaxCodes, 'u8', blocks);
      want('absmaxScales', absmaxScales, 'f32', Math.ceil(blocks / SCALES_PER_BLOCK));
      want('absmaxOffset', absmaxOffset, 'f32', 1);
    }
    const scope = new Scope();
    for (const t of [codes, absmax, absmaxCodes, absmaxScales, absmaxOffset]) if (t) scope.own(t);
    return new Nf4Weight(shape.slice(), blockSize, { ...parts }, scope);
  }

  /** The same weight on another device; this one is disposed. */
  to(device: DeviceLike): Nf4Weight {
    const scope = new Scope();
    const move = (t: Tensor | null): Tensor | null => {
      if (!t) return null;
      const out = scope.own(emptyLike(t, { device }));
      copy(out, t);
      return out;
    };
    const { codes, ...rest } = this.parts;
    const parts: Nf4Parts = {
      codes: move(codes) as Tensor,
      absmax: move(rest.absmax),
      absmaxCodes: move(rest.absmaxCodes),
      absmaxScales: move(rest.absmaxScales),
      absmaxOffset: move(rest.absmaxOffset),
    };
    const moved = new Nf4Weight(this.shape, this.blockSize, parts, scope);
    this.dispose(); // pageable memory: the driver has read it
    return moved;
  }

  plain(): null {
    return null;
  }

  dequantize(out: Tensor): void {
    checkOut('Nf4Weight.dequantize', this.shape, out);
    const { codes, absmax, absmaxCodes, absmaxScales, absmaxOffset } = this.parts;
    if (absmax) native().nf4Dequantize({ codes, out, block: this.blockSize, absmax });
    else {
      const rest = { codes2: absmaxCodes, scales: absmaxScales, offset: absmaxOffset } as {
        codes2: Tensor;
        scales: Tensor;
        offset: Tensor;
      };
      native().nf4Dequantize({ codes, out, block: this.blockSize, ...rest });
    }
  }

  /** Gives the tensors back. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

function checkBlock(op: string, blockSize: number): void {
  if (!Number.isInteger(Math.log2(blockSize)) || blockSize < 32 || blockSize > 4096) {
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: blockSize must be a power of two from 32 to 4096, got ${blockSize}; 64 is usual`);
  }
}
