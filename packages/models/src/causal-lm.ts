import { type RopeTable, ropeInit } from '@lc/attention';
import type { PeftConfig } from '@lc/qlora';
import {
  type Device,
  embeddingGather,
  gemm,
  type Parameter,
  rmsNorm,
  rmsNormBackward,
  type Scope,
  type Tensor,
  type Workspace,
} from '@lc/tensor';
import { TiledBlock } from '@lc/tiled-mlp';
import type { ModelConfig } from './config.js';
import type { DecoderLayer } from './layer.js';
import type { ExpertModule, LinearModule } from './modules.js';

/** The tensors and layers a model is made of; `CausalLM` owns what `scope` holds. */
export interface CausalLMParts {
  readonly config: ModelConfig;
  readonly folder: string | null;
  readonly device: Device;
  /** [vocab, hidden] */
  readonly embed: Tensor;
  readonly layers: readonly DecoderLayer[];
  /** [hidden] */
  readonly finalNorm: Tensor;
  /** [vocab, hidden]; the embedding itself where the model ties them. */
  readonly lmHead: Tensor;
  /** Linears that `attachLora` may target. */
  readonly linearModules: readonly LinearModule[];
  /** Fused experts that it may target. */
  readonly expertModules: readonly ExpertModule[];
  readonly scope: Scope;
}

/** A decoder-only language model: an embedding, layers to be walked chunk by chunk, a norm and a head. Frozen but for what `attachLora` adds. */
export class CausalLM implements Disposable {
  readonly config: ModelConfig;
  readonly folder: string | null;
  readonly device: Device;
  readonly embed: Tensor;
  readonly layers: readonly DecoderLayer[];
  readonly finalNorm: Tensor;
  readonly lmHead: Tensor;
  readonly linearModules: readonly LinearModule[];
  readonly expertModules: readonly ExpertModule[];
  /** Of the adapter that `attachLora` put on; null: the base alone. */
  adapterConfig: PeftConfig | null = null;
  private readonly scope: Scope;
  private table: RopeTable | null = null;
  private tableLength = 0;

  constructor(parts: CausalLMParts) {
    this.config = parts.config;
    this.folder = parts.folder;
    this.device = parts.device;
    this.embed = parts.embed;
    this.layers = parts.layers;
    this.finalNorm = parts.finalNorm;
    this.lmHead = parts.lmHead;
    this.linearModules = parts.linearModules;
    this.expertModules = parts.expertModules;
    this.scope = parts.scope;
  }

  /** Everything trainable, layer by layer. */
  get parameters(): readonly Parameter[] {
    return this.layers.flatMap((layer) => layer.parameters);
  }

  /**
   * Tokens per tile of every MLP, for a planner that chooses it after loading. Between steps only: recomputation must cut as the forward did.
   * @throws ERR_LC_ARGUMENT
   */
  setTile(tokens: number): void {
    for (const { mlp } of this.layers) if (mlp instanceof TiledBlock) mlp.tile = tokens;
  }

  /** Whether backward gives the same bits every time; layers begin as deterministic. See `attentionBackward`. */
  setDeterministic(deterministic: boolean): void {
    for (const layer of this.layers) layer.deterministic = deterministic;
  }

  /** The rotation in force. */
  get rope(): RopeTable {
    this.table ??= this.ropeFor(0);
    return this.table;
  }

  /**
   * Tells the model the length of the longest document it is about to see: dynamic RoPE takes its frequencies from it, as transformers does for a batch
   * of position ids; other kinds of RoPE do not change. Call it before a sequence's first forward, and not again before its backward.
   */
  setSequenceLength(tokens: number): void {
    if (this.config.rope.ropeType !== 'dynamic' || tokens === this.tableLength) return;
    this.table = this.ropeFor(tokens);
    this.tableLength = tokens;
  }

  private ropeFor(seqLen: number): RopeTable {
    const { rope, headDim, maxPositionEmbeddings } = this.config;
    return ropeInit(rope, { headDim, maxPositionEmbeddings, seqLen });
  }

  /** ids i32 [n], out [n, hidden]. */
  embedForward(ids: Tensor, out: Tensor): void {
    embeddingGather({ table: this.embed, ids, out });
  }

  /** x, out [n, hidden]; out may be x. */
  finalNormForward(x: Tensor, out: Tensor): void {
    rmsNorm({ x, weight: this.finalNorm, out, eps: this.config.rmsNormEps });
  }

  /** Needs x as it was before the norm; dx may be dout. */
  finalNormBackward(x: Tensor, dout: Tensor, dx: Tensor): void {
    rmsNormBackward({ x, weight: this.finalNorm, dout, dx, eps: this.config.rmsNormEps });
  }

  /** Logits of the last layer's output: hidden [n, hidden], out [n, vocab]. For checks and generation; training never holds logits of many tokens. */
  logits(hidden: Tensor, out: Tensor, ws: Workspace): void {
    ws.scoped(() => {
      const normed = ws.alloc(hidden.shape);
      this.finalNormForward(hidden, normed);
      gemm({ a: normed, b: this.lmHead, c: out, transB: true });
    });
  }

  /** Hands something over, to be disposed with the model. */
  own<T extends Disposable>(item: T): T {
    return this.scope.own(item);
  }

  /** Frees every tensor of the model, adapters included. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
