import { type DeviceLike, type DType, empty, LcError, Scope, type Tensor, Workspace } from '@lc/tensor';
import { openSafetensorsFolder, type SafetensorsReader } from '@lc/tensor/safetensors';
import { TiledBlock } from '@lc/tiled-mlp';
import { CausalLM } from './causal-lm.js';
import { type ModelConfig, readModelConfig } from './config.js';
import { type AttentionParts, DecoderLayer } from './layer.js';
import { attachLora, type LoraConfig } from './lora.js';
import { loadMlp, type MlpModules } from './mlp.js';
import { type ExpertModule, type LinearModule, linearModule } from './modules.js';
import { checkTensors, type ExpertLayout } from './tensors.js';
import { WeightLoader } from './weights.js';

/** How weights are held, and where. */
export interface LoadOptions {
  /** Quantize the linears of attention and MLP, and bf16 experts, to NF4 with double quantization. MXFP4 checkpoints keep their own blocks. Default false. */
  loadIn4bit?: boolean;
  /** Default 'cpu'. */
  device?: DeviceLike;
  /** What unquantized linears and experts are kept in. Default: what they are computed in (f32 on the CPU, bf16 on CUDA). 'bf16' on the CPU halves them, and converts per layer and pass. */
  dtype?: DType;
  /** Tokens per tile of the MLP. Default 1024. */
  tile?: number;
  /** Replaces the RoPE scaling of config.json. Default: config.json's, unchanged. */
  ropeScaling?: Readonly<Record<string, unknown>>;
  /** Checked against the positions that the RoPE of the model covers. */
  maxSeqLength?: number;
  /** Attach a LoRA at once. */
  lora?: LoraConfig;
}

/**
 * Loads a Hugging Face folder: config.json and `model.safetensors`, or its shards. Nothing is guessed: an architecture, a field or a tensor that is not
 * understood is an error.
 * @throws ERR_LC_IO, ERR_LC_CONFIG, ERR_LC_MODEL (unknown architecture; every missing, extra and misshapen tensor), ERR_LC_SAFETENSORS, ERR_LC_NAN,
 *   ERR_LC_ADAPTER, ERR_LC_OUT_OF_MEMORY
 */
export async function loadModel(folder: string, options: LoadOptions = {}): Promise<CausalLM> {
  const config = readModelConfig(folder, options.ropeScaling ? { ropeScaling: options.ropeScaling } : {});
  if (options.maxSeqLength !== undefined) checkLength(config, options.maxSeqLength);
  using reader = await openSafetensorsFolder(folder);
  const { experts } = checkTensors(reader, config);
  const scope = new Scope();
  try {
    const model = await buildModel(folder, config, reader, experts, scope, options);
    if (options.lora) attachLora(model, options.lora);
    return model;
  } catch (error) {
    scope.dispose();
    throw error;
  }
}

/** Positions that the model's RoPE was made for: more of them need a scaling that someone chose. */
export function maxPositions(config: ModelConfig): number {
  const { ropeType, factor = 1, originalMaxPositionEmbeddings } = config.rope;
  if (ropeType === 'dynamic') return Number.POSITIVE_INFINITY;
  const scaled = ropeType === 'linear' ? config.maxPositionEmbeddings * factor : (originalMaxPositionEmbeddings ?? 0) * factor;
  return Math.max(config.maxPositionEmbeddings, Math.floor(scaled));
}

function checkLength(config: ModelConfig, maxSeqLength: number): void {
  const most = maxPositions(config);
  if (!Number.isSafeInteger(maxSeqLength) || maxSeqLength < 1)
    throw new LcError('ERR_LC_CONFIG', `loadModel: maxSeqLength must be a whole number of at least 1, got ${maxSeqLength}`);
  if (maxSeqLength <= most) return;
  const { ropeType, originalMaxPositionEmbeddings = config.maxPositionEmbeddings } = config.rope;
  const factor = Math.ceil(maxSeqLength / originalMaxPositionEmbeddings);
  throw new LcError(
    'ERR_LC_CONFIG',
    `loadModel: maxSeqLength ${maxSeqLength} is beyond the ${most} positions that this model's RoPE (${ropeType}) covers; set ropeScaling, e.g. { rope_type: 'yarn', factor: ${factor} }, or shorten the sequences`,
  );
}

/** What `loadModel` does after opening a checkpoint; `folder` null: there is none. */
export async function buildModel(
  folder: string | null,
  config: ModelConfig,
  reader: SafetensorsReader,
  experts: ExpertLayout | null,
  scope: Scope,
  options: LoadOptions,
): Promise<CausalLM> {
  // The workspace that will run the model knows the device's dtype; an empty one costs nothing.
  using probe = new Workspace({ device: options.device ?? 'cpu' });
  const { device, dtype: computeDtype } = probe;
  const { loadIn4bit = false, dtype = computeDtype, tile = 1024 } = options;
  const loader = new WeightLoader(reader, scope, { device, computeDtype, dtype, loadIn4bit });
  const embed = await loader.dense('model.embed_tokens.weight');
  const finalNorm = await loader.dense('model.norm.weight');
  const lmHead = config.tieWordEmbeddings ? embed : await loader.dense('lm_head.weight');
  if (config.tieWordEmbeddings) await checkTied(reader, embed);
  const layers: DecoderLayer[] = [];
  const linearModules: LinearModule[] = [];
  const expertModules: ExpertModule[] = [];
  const rope = (): CausalLM['rope'] => model.rope;
  for (const [i, { window }] of config.layers.entries()) {
    const prefix = `model.layers.${i}`;
    const attention = await loadAttention(loader, config, prefix);
    const mlp: MlpModules = await loadMlp(loader, config, i, experts, tile);
    const { hiddenSize, numAttentionHeads, numKeyValueHeads, headDim, rmsNormEps } = config;
    const layer = new DecoderLayer({
      hiddenSize,
      numAttentionHeads,
      numKeyValueHeads,
      headDim,
      rmsNormEps,
      window,
      attention,
      mlp: mlp.block(),
      rope,
    });
    layers.push(layer);
    for (const key of ['q', 'k', 'v', 'o'] as const) linearModules.push(linearModule(`${prefix}.self_attn.${key}_proj`, attention, key));
    const rebuild = (): void => {
      const { mlp: before } = layer;
      layer.mlp = mlp.block();
      if (before instanceof TiledBlock && layer.mlp instanceof TiledBlock) layer.mlp.tile = before.tile;
    };
    linearModules.push(...mlp.linears(rebuild));
    expertModules.push(...mlp.experts(rebuild));
  }
  loader.finish();
  const model: CausalLM = new CausalLM({ config, folder, device, embed, layers, finalNorm, lmHead, linearModules, expertModules, scope });
  return model;
}

async function loadAttention(loader: WeightLoader, config: ModelConfig, prefix: string): Promise<AttentionParts> {
  const name = `${prefix}.self_attn`;
  return {
    inputNorm: await loader.dense(`${prefix}.input_layernorm.weight`),
    q: await loader.linear(`${name}.q_proj`, config.qkvBias),
    k: await loader.linear(`${name}.k_proj`, config.qkvBias),
    v: await loader.linear(`${name}.v_proj`, config.qkvBias),
    o: await loader.linear(`${name}.o_proj`, config.outBias),
    qNorm: config.qkNorm ? await loader.dense(`${name}.q_norm.weight`) : null,
    kNorm: config.qkNorm ? await loader.dense(`${name}.k_norm.weight`) : null,
    sinks: config.sinks ? await loader.dense(`${name}.sinks`, 'f32') : null,
  };
}

/** A tied model may carry its head a second time. Were it another matrix, leaving it out would be another model. */
async function checkTied(reader: SafetensorsReader, embed: Tensor): Promise<void> {
  if (!reader.has('lm_head.weight') || embed.device.startsWith('cuda')) return;
  const { shape } = reader.info('lm_head.weight');
  if (shape.join() === embed.shape.join()) {
    using head = empty(shape, { dtype: embed.dtype, label: 'load' });
    await reader.readInto('lm_head.weight', head);
    const want = embed.data();
    if (head.data().every((value, i) => value === want[i])) return;
  }
  throw new LcError(
    'ERR_LC_MODEL',
    `${reader.path}: config.json ties the head to the embedding (tie_word_embeddings), but lm_head.weight is another matrix; set tie_word_embeddings to false if the head is separate`,
  );
}
