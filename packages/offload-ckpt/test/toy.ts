/** A causal layer small enough to differentiate by hand: y_t = x_t + tanh(sum of K_s over the document up to t), K_s = v * x_s. Features are independent. */
import { type Layer, type LayerState, type Parameter, type Pass, type Span, type Tensor, type Workspace, zeros } from '@lc/tensor';
import { seededRandom } from '@lc/tensor/testing';

interface ToyState extends LayerState {
  k: Tensor;
  dk: Tensor | null;
}

/** How work reaches the compute stream: at once, or queued on a fake one. */
export type Launch = (work: () => void) => void;

export class ToyLayer implements Layer {
  readonly parameters: readonly Parameter[];
  readonly v: Tensor;
  readonly grad: Tensor;
  opened = 0;
  calls: string[] = [];

  constructor(
    readonly index: number,
    readonly width: number,
    private readonly launch: Launch = (work) => work(),
  ) {
    this.v = zeros([width], { label: 'toy' });
    this.grad = zeros([width], { label: 'toy' });
    const random = seededRandom(100 + index);
    this.v.data().forEach((_, i, data) => {
      data[i] = random() - 0.5;
    });
    this.parameters = [{ name: `layers.${index}.v`, value: this.v, grad: this.grad }];
  }

  open(tokens: number, pass: Pass, ws: Workspace): ToyState {
    this.opened++;
    const k = ws.alloc([tokens, this.width]);
    const dk = pass === 'backward' ? ws.alloc([tokens, this.width]) : null;
    this.launch(() => {
      k.data().fill(Number.NaN); // whoever reads K before it was filled is caught
      dk?.data().fill(0);
    });
    return { tokens, k, dk };
  }
  close(): void {
    this.opened--;
  }

  fill(x: Tensor, at: Span, state: ToyState): void {
    this.calls.push(`fill ${at.start}`);
    this.launch(() => {
      const [k, input, v] = [state.k.data(), x.data(), this.v.data()];
      for (let i = 0; i < at.length * this.width; i++) k[at.start * this.width + i] = (input[i] as number) * (v[i % this.width] as number);
    });
  }

  forward(x: Tensor, out: Tensor, at: Span, state: ToyState, ws: Workspace): void {
    this.fill(x, at, state);
    this.calls.push(`forward ${at.start}`);
    ws.scoped(() => {
      const temporary = ws.alloc([at.length, this.width]); // as real layers do
      this.launch(() => {
        const [input, output, sum] = [x.data(), out.data(), temporary.data()];
        for (let t = 0; t < at.length; t++) {
          for (let f = 0; f < this.width; f++) sum[t * this.width + f] = this.prefix(at, t, f, state);
        }
        for (let i = 0; i < at.length * this.width; i++) output[i] = (input[i] as number) + Math.tanh(sum[i] as number);
      });
    });
  }

  backward(x: Tensor, dout: Tensor, dx: Tensor, at: Span, state: ToyState): void {
    this.calls.push(`backward ${at.start}`);
    this.launch(() => {
      const w = this.width;
      const [input, gradient, out, dk, v, dv] = [
        x.data(),
        dout.data(),
        dx.data(),
        (state.dk as Tensor).data(),
        this.v.data(),
        this.grad.data(),
      ];
      for (let t = at.length - 1; t >= 0; t--) {
        for (let f = 0; f < w; f++) {
          const ds = (gradient[t * w + f] as number) * (1 - Math.tanh(Math.fround(this.prefix(at, t, f, state))) ** 2);
          for (let s = this.documentStart(at, t); s <= at.start + t; s++) dk[s * w + f] = (dk[s * w + f] as number) + ds;
        }
        for (let f = 0; f < w; f++) {
          const i = (at.start + t) * w + f;
          out[t * w + f] = (gradient[t * w + f] as number) + (v[f] as number) * (dk[i] as number);
          dv[f] = (dv[f] as number) + (input[t * w + f] as number) * (dk[i] as number);
        }
      }
    });
  }

  dispose(): void {
    this.v.dispose();
    this.grad.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }

  private documentStart(at: Span, t: number): number {
    return at.docStart ? (at.docStart.data<Int32Array>()[t] as number) : 0;
  }
  /** In token order, so that chunking does not change a bit. */
  private prefix(at: Span, t: number, f: number, state: ToyState): number {
    const k = state.k.data();
    let sum = 0;
    for (let s = this.documentStart(at, t); s <= at.start + t; s++) sum += k[s * this.width + f] as number;
    return sum;
  }
}

/** The same stack in f64, whole sequence at once, with loss = sum(weight * hidden): hidden, dv of every layer, and dx[0]. Shares nothing with ToyLayer. */
export function reference(
  x0: ArrayLike<number>,
  lossWeight: ArrayLike<number>,
  v: readonly ArrayLike<number>[],
  width: number,
  docStart: ArrayLike<number>,
) {
  const n = docStart.length;
  const at = (a: ArrayLike<number>, t: number, f: number): number => a[t * width + f] as number;
  const inputs: Float64Array[] = [Float64Array.from(x0)];
  const sums: Float64Array[] = [];
  v.forEach((weights, l) => {
    const x = inputs[l] as Float64Array;
    const s = new Float64Array(n * width);
    const y = new Float64Array(n * width);
    for (let f = 0; f < width; f++) {
      for (let t = 0; t < n; t++) {
        const start = t === docStart[t];
        s[t * width + f] = (start ? 0 : at(s, t - 1, f)) + at(x, t, f) * (weights[f] as number);
        y[t * width + f] = at(x, t, f) + Math.tanh(at(s, t, f));
      }
    }
    sums.push(s);
    inputs.push(y);
  });
  let d: Float64Array = Float64Array.from(lossWeight);
  const dv = v.map(() => new Float64Array(width));
  for (let l = v.length - 1; l >= 0; l--) {
    const next = Float64Array.from(d);
    for (let f = 0; f < width; f++) {
      let carried = 0;
      for (let t = n - 1; t >= 0; t--) {
        carried += at(d, t, f) * (1 - Math.tanh(at(sums[l] as Float64Array, t, f)) ** 2);
        (dv[l] as Float64Array)[f] = ((dv[l] as Float64Array)[f] as number) + at(inputs[l] as Float64Array, t, f) * carried;
        next[t * width + f] = at(d, t, f) + (v[l]?.[f] as number) * carried;
        if (t === docStart[t]) carried = 0;
      }
    }
    d = next;
  }
  return { hidden: inputs[v.length] as Float64Array, dv, dx: d };
}
