import { empty, LcError, LcTypeError, type Tensor } from '@lc/tensor';
import { native } from './native.js';
import { checkOut, type WeightStorage } from './weights.js';

/**
 * MXFP4 (OCP Microscaling Formats 1.0) in gpt-oss's checkpoint layout: `blocks` u8 [..., out, in / 32, 16], low nibble first, `scales` u8
 * [..., out, in / 32], E8M0 (2^(byte - 127); 255 is NaN). 4.25 bits per weight. The weight's shape is [..., out, in], which is the transpose of what
 * transformers dequantizes to. Owns its tensors.
 */
export class Mxfp4Weight implements WeightStorage {
  readonly format = 'mxfp4';
  readonly shape: readonly number[];
  readonly nbytes: number;
  readonly blocks: Tensor;
  readonly scales: Tensor;

  /** Takes over the tensors of a checkpoint. @throws ERR_LC_SHAPE, ERR_LC_DTYPE */
  constructor(options: { blocks: Tensor; scales: Tensor }) {
    const { blocks, scales } = options;
    const groups = blocks.shape.slice(0, -1);
    const same = groups.length === scales.shape.length && groups.every((size, i) => size === scales.shape[i]);
    if (blocks.dtype !== 'u8' || scales.dtype !== 'u8')
      throw new LcTypeError('ERR_LC_DTYPE', `Mxfp4Weight: expected u8 blocks and scales, got ${blocks} and ${scales}`);
    if (blocks.shape.length < 3 || blocks.shape.at(-1) !== 16 || !same) {
      throw new LcTypeError(
        'ERR_LC_SHAPE',
        `Mxfp4Weight: expected blocks [..., out, in/32, 16] and scales [..., out, in/32], got ${blocks} and ${scales}`,
      );
    }
    this.blocks = blocks;
    this.scales = scales;
    this.shape = [...groups.slice(0, -1), (groups.at(-1) as number) * 32];
    this.nbytes = blocks.nbytes + scales.nbytes;
  }

  /**
   * Quantizes `x` [..., out, in] (f32, bf16 or f16; in a multiple of 32): the scale is the power of two of the block's largest magnitude over 4,
   * elements round to nearest, ties to even, and saturate at 6 scales. @throws ERR_LC_NAN, ERR_LC_SHAPE
   */
  static quantize(x: Tensor, options: { label?: string } = {}): Mxfp4Weight {
    const label = options.label ?? 'mxfp4';
    const width = x.shape.at(-1) ?? 0;
    if (x.shape.length < 2 || width % 32 !== 0)
      throw new LcTypeError('ERR_LC_SHAPE', `Mxfp4Weight.quantize: expected [..., out, in] with in a multiple of 32, got ${x}`);
    const groups = [...x.shape.slice(0, -1), width / 32];
    const blocks = empty([...groups, 16], { dtype: 'u8', label });
    const scales = empty(groups, { dtype: 'u8', label });
    try {
      if (!native().mxfp4Quantize({ x, blocks, scales })) {
        throw new LcError('ERR_LC_NAN', `Mxfp4Weight.quantize: ${x} holds NaN or infinity; check the checkpoint it came from`);
      }
      return new Mxfp4Weight({ blocks, scales });
    } catch (error) {
      blocks.dispose();
      scales.dispose();
      throw error;
    }
  }

  plain(): null {
    return null;
  }
  dequantize(out: Tensor): void {
    checkOut('Mxfp4Weight.dequantize', this.shape, out);
    native().mxfp4Dequantize({ blocks: this.blocks, scales: this.scales, out });
  }
  /** Gives the tensors back. */
  dispose(): void {
    this.blocks.dispose();
    this.scales.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
