import {
  type ExpertLinear,
  fromTypedArray,
  gemm,
  groupedGemmWeightGrad,
  type Parameter,
  PlainExpertLinear,
  PlainLinear,
  type Span,
  type Tensor,
  type Workspace,
  zeros,
} from '@lc/tensor';

/** A linear whose whole weight is trained: what an adapter over it would see of dout, this sees. */
export class TrainedLinear extends PlainLinear {
  readonly grad: Tensor;
  override readonly parameters: readonly Parameter[];
  opened = 0;
  spans: Span[] = [];
  constructor(readonly value: Tensor) {
    super({ weight: value });
    this.grad = zeros(value.shape, { label: 'test' });
    this.parameters = [{ name: 'weight', value, grad: this.grad }];
  }
  override open(): void {
    this.opened++;
  }
  override close(): void {
    this.opened--;
  }
  override forward(x: Tensor, out: Tensor, at: Span, ws: Workspace): void {
    if (this.opened !== 1) throw new Error('not opened');
    this.spans.push(at);
    super.forward(x, out, at, ws);
  }
  override backward(x: Tensor, dout: Tensor, dx: Tensor | null, at: Span, ws: Workspace, accumulate = false): void {
    super.backward(x, dout, dx, at, ws, accumulate);
    gemm({ a: dout, b: x, c: this.grad, transA: true, beta: 1 });
  }
}

export class TrainedExpertLinear extends PlainExpertLinear implements ExpertLinear {
  readonly grad: Tensor;
  override readonly parameters: readonly Parameter[];
  forwards = 0;
  constructor(readonly value: Tensor) {
    super({ weight: value });
    this.grad = zeros(value.shape, { label: 'test' });
    this.parameters = [{ name: 'weight', value, grad: this.grad }];
  }
  override forward(x: Tensor, out: Tensor, offsets: Tensor, ws: Workspace): void {
    this.forwards++;
    super.forward(x, out, offsets, ws);
  }
  override backward(x: Tensor, dout: Tensor, dx: Tensor | null, offsets: Tensor, ws: Workspace, accumulate = false): void {
    super.backward(x, dout, dx, offsets, ws, accumulate);
    groupedGemmWeightGrad({ a: dout, b: x, c: this.grad, offsets, beta: 1 });
  }
}

export const tensorOf = (values: ArrayLike<number>, shape: number[]): Tensor => fromTypedArray(Float32Array.from(values), shape);
export const span = (length: number, start = 0, dropoutSeed?: number): Span => ({
  start,
  length,
  docStart: null,
  ...(dropoutSeed === undefined ? {} : { dropoutSeed }),
});

/** Central differences of sum(weight * f()) to every element of `values`, held against `gradient`; f64. */
export function finiteDifferences(
  values: Float64Array,
  gradient: ArrayLike<number>,
  weight: ArrayLike<number>,
  f: () => ArrayLike<number>,
): number {
  const loss = (): number => {
    const y = f();
    let sum = 0;
    for (let i = 0; i < y.length; i++) sum += (y[i] as number) * (weight[i] as number);
    return sum;
  };
  let worst = 0;
  for (let i = 0; i < values.length; i++) {
    const [middle, h] = [values[i] as number, 1e-5];
    values[i] = middle + h;
    const up = loss();
    values[i] = middle - h;
    const down = loss();
    values[i] = middle;
    worst = Math.max(worst, Math.abs((up - down) / (2 * h) - (gradient[i] as number)));
  }
  return worst;
}
