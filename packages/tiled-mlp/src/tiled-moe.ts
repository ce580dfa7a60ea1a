import { addBias, type ExpertLinear, gemm, LcTypeError, type Span, type Tensor, type Workspace } from '@lc/tensor';
import { activationCode, type GluArgs, native } from './native.js';
import { requireCount, requireFeatures, requireFinite, requireShape } from './plan.js';
import { TiledBlock, type TiledBlockOptions } from './tiled-block.js';

/** Router, experts and kind of a mixture. It owns none of them. */
export interface TiledMoEOptions extends TiledBlockOptions {
  /**
   * 'gpt-oss': top-k of the logits, then softmax over the k; gate and up interleaved, clamped to `limit`; out = (up + 1) * gate * sigmoid(alpha * gate).
   * 'qwen3-moe': softmax over all experts, then top-k, with `normTopkProb` divided by their sum; [gate; up] halves, silu(gate) * up.
   */
  kind: 'gpt-oss' | 'qwen3-moe';
  /** Frozen, f32: weight [experts, hidden], bias [experts]. */
  router: { weight: Tensor; bias?: Tensor | null | undefined };
  /** hidden -> 2 * intermediate. */
  gateUp: ExpertLinear;
  /** [experts, 2 * intermediate], in gateUp's column order. */
  gateUpBias?: Tensor | null | undefined;
  /** intermediate -> hidden. Without parameters it is not given its input in backward (`ExpertLinear.backward`). */
  down: ExpertLinear;
  /** [experts, hidden]. */
  downBias?: Tensor | null | undefined;
  /** Experts per token. */
  topK: number;
  /** Qwen3-MoE. Default true. */
  normTopkProb?: boolean | undefined;
  /** gpt-oss. Default 7. */
  limit?: number | undefined;
  /** gpt-oss. Default 1.702. */
  alpha?: number | undefined;
}

/** Which rows belong to which expert, in one tile. Pair = token * topK + j. */
interface Routing {
  ids: Tensor;
  weights: Tensor;
  pairOf: Tensor;
  rowOf: Tensor;
  offsets: Tensor;
  /** [tokens, experts]: logits, or the probabilities where the softmax ran over all. */
  logits: Tensor;
}

/**
 * A mixture-of-experts MLP, one tile of tokens at a time: rows of a tile are sorted by expert (stable), go through grouped linears, and are added up per
 * token in the order of its experts. Extra memory is that of a tile, whatever the sequence.
 *
 * Backward recomputes routing and activations of a tile (the same bits: the router runs in f32 on the same tile) but not the down projection. With dy = weight * dout per row,
 * down.backward gives dact = dy W and the down projection's own gradients in one call, and weight * d(loss)/d(weight) = <dact, act> + <dy, bias>: just
 * what the softmax's gradient is made of, so nothing is ever divided by a weight and a weight of 0 is exact. It holds for any `down` that is linear in its input, LoRA included.
 * Where `down` trains nothing, act is not stored at all: one pass over gate and up adds the bias, takes <dact, act>, and leaves their gradients.
 */
export class TiledMoE extends TiledBlock {
  readonly numExperts: number;
  readonly intermediateSize: number;
  readonly topK: number;
  private readonly o: TiledMoEOptions;
  private readonly glu: Omit<GluArgs, 'gate' | 'up'>;

  /** @throws LcTypeError ERR_LC_SHAPE, ERR_LC_ARGUMENT */
  constructor(options: TiledMoEOptions) {
    const { kind, router, gateUp, gateUpBias, down, downBias, topK, limit = 7, alpha = 1.702 } = options;
    super('TiledMoE', gateUp.inFeatures, [gateUp, down], options);
    this.o = options;
    this.numExperts = gateUp.numExperts;
    this.intermediateSize = down.inFeatures;
    this.topK = topK;
    if (kind !== 'gpt-oss' && kind !== 'qwen3-moe') {
      throw new LcTypeError('ERR_LC_ARGUMENT', `TiledMoE: kind must be 'gpt-oss' or 'qwen3-moe', got ${JSON.stringify(kind)}`);
    }
    requireCount(this.op, 'topK', topK);
    if (topK > this.numExperts) throw new LcTypeError('ERR_LC_ARGUMENT', `TiledMoE: topK is ${topK}, there are ${this.numExperts} experts`);
    requireFeatures(this.op, 'gateUp', gateUp, this.hiddenSize, 2 * this.intermediateSize);
    requireFeatures(this.op, 'down', down, this.intermediateSize, this.hiddenSize);
    if (down.numExperts !== this.numExperts) {
      throw new LcTypeError('ERR_LC_SHAPE', `TiledMoE: gateUp has ${this.numExperts} experts, down has ${down.numExperts}`);
    }
    requireShape(this.op, 'router.weight', router.weight, [this.numExperts, this.hiddenSize]);
    if (router.bias) requireShape(this.op, 'router.bias', router.bias, [this.numExperts]);
    if (gateUpBias) requireShape(this.op, 'gateUpBias', gateUpBias, [this.numExperts, 2 * this.intermediateSize]);
    if (downBias) requireShape(this.op, 'downBias', downBias, [this.numExperts, this.hiddenSize]);
    requireFinite(this.op, 'limit', limit, 0);
    requireFinite(this.op, 'alpha', alpha, 0);
    this.glu = { activation: kind === 'gpt-oss' ? activationCode.gptOss : activationCode.silu, limit, alpha };
  }

  protected override tileForward(h: Tensor, base: Tensor | null, out: Tensor, at: Span, ws: Workspace): void {
    const { down, downBias = null } = this.o;
    const routing = this.route(h, at.length, ws);
    const { rows: y, both } = this.expand(h, routing, ws);
    const act = this.activate(both, routing, true, ws);
    down.forward(act, y, routing.offsets, ws); // the rows' memory takes the experts' output
    native().combine({ y, out, base, bias: downBias, ...this.pairs(routing), weights: routing.weights });
  }

  protected override tileBackward(h: Tensor, dout: Tensor, dh: Tensor, at: Span, ws: Workspace): void {
    const { o } = this;
    const { down, downBias = null, gateUp, router, kind, normTopkProb = true } = o;
    const { topK } = this;
    const routing = this.route(h, at.length, ws);
    const { ids, offsets, pairOf, weights } = routing;
    const { rows, both } = this.expand(h, routing, ws);
    const trains = down.parameters.length > 0;
    const act = trains ? this.activate(both, routing, false, ws) : null;
    const dy = ws.alloc(rows.shape);
    const dact = ws.alloc([pairOf.shape[0] as number, this.intermediateSize]);
    const dlogits = ws.alloc(routing.logits.shape, 'f32');
    native().gather({ x: dout, out: dy, rowOf: routing.rowOf, topK, weights });
    down.backward(act ?? dact, dy, dact, offsets, ws); // without parameters it reads no input: any tensor of that shape will do
    const probabilities = kind === 'qwen3-moe' && !normTopkProb ? routing.logits : null;
    const gradient = { dy, bias: downBias, weights, probabilities, ...this.pairs(routing), dlogits };
    const gates = { ...this.halves(both), ...this.glu, dout: dact };
    if (act) {
      native().routeBackward({ ...gradient, act, dact });
      native().gluBackward(gates);
    } else {
      const dots = ws.alloc([dact.shape[0] as number], 'f32');
      native().gluBackward({ ...gates, bias: o.gateUpBias ?? null, ids, pairOf, dots });
      native().routeBackward({ ...gradient, dots });
    }
    gateUp.backward(rows, both, dy, offsets, ws); // dy's memory takes the gradient of the rows
    native().combine({ y: dy, out: dh, ...this.pairs(routing) });
    gemm({ a: dlogits, b: router.weight, c: dh, beta: 1 });
  }

  private pairs({ rowOf, ids }: Routing): { rowOf: Tensor; ids: Tensor; topK: number } {
    return { rowOf, ids, topK: this.topK };
  }

  private route(h: Tensor, tokens: number, ws: Workspace): Routing {
    const { router, kind, normTopkProb = true } = this.o;
    const pairs = [tokens * this.topK];
    const logits = ws.alloc([tokens, this.numExperts], 'f32');
    gemm({ a: h, b: router.weight, c: logits, transB: true });
    if (router.bias) addBias({ x: logits, bias: router.bias });
    const [ids, pairOf, rowOf] = [ws.alloc(pairs, 'i32'), ws.alloc(pairs, 'i32'), ws.alloc(pairs, 'i32')];
    const routing = { ids, pairOf, rowOf, weights: ws.alloc(pairs, 'f32'), offsets: ws.alloc([this.numExperts + 1], 'i32'), logits };
    native().route({ ...routing, topK: this.topK, softmaxFirst: kind === 'qwen3-moe', normalize: normTopkProb });
    return routing;
  }

  /** Rows sorted by expert, and gate and up of each, without their bias. */
  private expand(h: Tensor, { pairOf, rowOf, offsets }: Routing, ws: Workspace): { rows: Tensor; both: Tensor } {
    const count = pairOf.shape[0] as number;
    const rows = ws.alloc([count, this.hiddenSize]);
    const both = ws.alloc([count, 2 * this.intermediateSize]);
    native().gather({ x: h, out: rows, rowOf, topK: this.topK });
    this.o.gateUp.forward(rows, both, offsets, ws);
    return { rows, both };
  }

  /** The activation. Adds the bias to gate and up, unless `forwardOnly`: they are not read again then. */
  private activate(both: Tensor, { ids, pairOf }: Routing, forwardOnly: boolean, ws: Workspace): Tensor {
    const act = ws.alloc([pairOf.shape[0] as number, this.intermediateSize]);
    native().glu({ ...this.halves(both), ...this.glu, out: act, bias: this.o.gateUpBias ?? null, ids, pairOf, forwardOnly });
    return act;
  }

  private halves(both: Tensor): { gate: Tensor; up: Tensor | null } {
    if (this.o.kind === 'gpt-oss') return { gate: both, up: null };
    return { gate: both.slice(1, 0, this.intermediateSize), up: both.slice(1, this.intermediateSize, this.intermediateSize) };
  }
}
