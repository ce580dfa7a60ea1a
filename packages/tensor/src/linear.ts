import type { ExpertLinear, Linear, Parameter, Pass, Span } from './blocks.js';
import { LcTypeError } from './errors.js';
import { gemm, groupedGemm } from './gemm.js';
import type { Tensor } from './tensor.js';
import type { Workspace } from './workspace.js';

/** A frozen dense linear over a weight in the compute dtype: y = x W^T + b. It does not own its tensors. */
export class PlainLinear implements Linear {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[] = [];
  readonly weight: Tensor;
  readonly bias: Tensor | null;

  /** @param options.weight [outFeatures, inFeatures]; @param options.bias [outFeatures] */
  constructor(options: { weight: Tensor; bias?: Tensor | null }) {
    const { weight, bias = null } = options;
    if (weight.shape.length !== 2) throw new LcTypeError('ERR_LC_SHAPE', `PlainLinear: weight must be [out, in], got ${weight}`);
    if (bias && (bias.shape.length !== 1 || bias.shape[0] !== weight.shape[0])) {
      throw new LcTypeError('ERR_LC_SHAPE', `PlainLinear: bias must be [${weight.shape[0]}], got ${bias}`);
    }
    this.weight = weight;
    this.bias = bias;
    this.outFeatures = weight.shape[0] as number;
    this.inFeatures = weight.shape[1] as number;
  }

  open(_pass: Pass, _ws: Workspace): void {}
  /** Nothing to let go of. */
  close(): void {}

  forward(x: Tensor, out: Tensor, _at: Span, _ws: Workspace): void {
    gemm({ a: x, b: this.weight, c: out, transB: true, bias: this.bias });
  }

  backward(_x: Tensor, dout: Tensor, dx: Tensor | null, _at: Span, _ws: Workspace, accumulate = false): void {
    if (dx) gemm({ a: dout, b: this.weight, c: dx, beta: accumulate ? 1 : 0 });
  }
}

/** Frozen dense experts in the compute dtype. It does not own its tensor. */
export class PlainExpertLinear implements ExpertLinear {
  readonly numExperts: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[] = [];
  readonly plain: Tensor;

  /** @param options.weight [experts, outFeatures, inFeatures] */
  constructor(options: { weight: Tensor }) {
    const { weight } = options;
    if (weight.shape.length !== 3)
      throw new LcTypeError('ERR_LC_SHAPE', `PlainExpertLinear: weight must be [experts, out, in], got ${weight}`);
    this.plain = weight;
    [this.numExperts, this.outFeatures, this.inFeatures] = weight.shape as [number, number, number];
  }

  materialize(_out: Tensor): void {
    throw new LcTypeError('ERR_LC_ARGUMENT', 'PlainExpertLinear.materialize: the weights are plain already; read `plain`');
  }
  open(_pass: Pass, _ws: Workspace): void {}
  /** Nothing to let go of. */
  close(): void {}

  forward(x: Tensor, out: Tensor, offsets: Tensor, _ws: Workspace): void {
    groupedGemm({ a: x, b: this.plain, c: out, offsets, transB: true });
  }
  backward(_x: Tensor, dout: Tensor, dx: Tensor | null, offsets: Tensor, _ws: Workspace, accumulate = false): void {
    if (dx) groupedGemm({ a: dout, b: this.plain, c: dx, offsets, beta: accumulate ? 1 : 0 });
  }
}
