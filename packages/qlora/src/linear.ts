import {
  type ExpertLinear,
  gemm,
  groupedGemm,
  LcTypeError,
  type Linear,
  type Parameter,
  type Pass,
  type Span,
  type Tensor,
  type Workspace,
} from '@lc/tensor';
import type { WeightStorage } from './weights.js';

/** The weight in the compute dtype: as it lies, as `open` prepared it, or dequantized into `ws` for this one call. */
function prepared(weight: WeightStorage, opened: Tensor | null, ws: Workspace): Tensor {
  const ready = opened ?? weight.plain(ws.dtype);
  if (ready) return ready;
  const out = ws.alloc(weight.shape);
  weight.dequantize(out);
  return out;
}

/**
 * A frozen linear y = x W^T + b over a weight in any storage. `open` dequantizes it once into the workspace; a `forward` or `backward` without
 * `open` does so for itself. Owns neither weight nor bias.
 */
export class QuantizedLinear implements Linear {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[] = [];
  readonly weight: WeightStorage;
  readonly bias: Tensor | null;
  private opened: Tensor | null = null;

  /** @param options.weight [out, in]; @param options.bias [out], in the compute dtype. @throws ERR_LC_SHAPE */
  constructor(options: { weight: WeightStorage; bias?: Tensor | null }) {
    const { weight, bias = null } = options;
    const [out, width] = weight.shape;
    if (weight.shape.length !== 2)
      throw new LcTypeError('ERR_LC_SHAPE', `QuantizedLinear: weight must be [out, in], got [${weight.shape}]`);
    if (bias && (bias.shape.length !== 1 || bias.shape[0] !== out))
      throw new LcTypeError('ERR_LC_SHAPE', `QuantizedLinear: bias must be [${out}], got ${bias}`);
    this.weight = weight;
    this.bias = bias;
    this.outFeatures = out as number;
    this.inFeatures = width as number;
  }

  open(_pass: Pass, ws: Workspace): void {
    this.opened = prepared(this.weight, null, ws);
  }
  /** Forgets the dequantized weight; its memory goes with the workspace. */
  close(): void {
    this.opened = null;
  }

  forward(x: Tensor, out: Tensor, _at: Span, ws: Workspace): void {
    ws.scoped(() => gemm({ a: x, b: prepared(this.weight, this.opened, ws), c: out, transB: true, bias: this.bias }));
  }

  backward(_x: Tensor, dout: Tensor, dx: Tensor | null, _at: Span, ws: Workspace, accumulate = false): void {
    if (dx) ws.scoped(() => gemm({ a: dout, b: prepared(this.weight, this.opened, ws), c: dx, beta: accumulate ? 1 : 0 }));
  }
}

/** Frozen experts over a weight in any storage. Does not own it. */
export class QuantizedExpertLinear implements ExpertLinear {
  readonly numExperts: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[] = [];
  readonly weight: WeightStorage;
  private opened: Tensor | null = null;

  /** @param options.weight [experts, out, in]. @throws ERR_LC_SHAPE */
  constructor(options: { weight: WeightStorage }) {
    const { weight } = options;
    if (weight.shape.length !== 3)
      throw new LcTypeError('ERR_LC_SHAPE', `QuantizedExpertLinear: weight must be [experts, out, in], got [${weight.shape}]`);
    this.weight = weight;
    [this.numExperts, this.outFeatures, this.inFeatures] = weight.shape as [number, number, number];
  }

  /** On the CPU (f32). */
  get plain(): Tensor | null {
    return this.weight.plain('f32');
  }
  materialize(out: Tensor): void {
    this.weight.dequantize(out);
  }
  open(_pass: Pass, ws: Workspace): void {
    this.opened = prepared(this.weight, null, ws);
  }
  /** Forgets the dequantized weight; its memory goes with the workspace. */
  close(): void {
    this.opened = null;
  }

  forward(x: Tensor, out: Tensor, offsets: Tensor, ws: Workspace): void {
    ws.scoped(() => groupedGemm({ a: x, b: prepared(this.weight, this.opened, ws), c: out, offsets, transB: true }));
  }
  backward(_x: Tensor, dout: Tensor, dx: Tensor | null, offsets: Tensor, ws: Workspace, accumulate = false): void {
    if (dx) ws.scoped(() => groupedGemm({ a: dout, b: prepared(this.weight, this.opened, ws), c: dx, offsets, beta: accumulate ? 1 : 0 }));
  }
}
