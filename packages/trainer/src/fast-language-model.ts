/** `FastLanguageModel`: load a Hugging Face folder, put an adapter on it. Names as in Unsloth, in camelCase. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { loadTokenizer, type Tokenizer } from '@lc/data';
import {
  attachLora,
  type CausalLM,
  type GenerateOptions,
  generate,
  loadAdapterOnto,
  loadModel,
  maxPositions,
  saveAdapterOf,
} from '@lc/models';
import { type Device, type DeviceLike, LcError, type Parameter } from '@lc/tensor';
import type { ModelShape } from '@lc/vram-probe';
import { shapeOf } from './model-shape.js';

/** How a model is loaded. */
export interface FromPretrainedOptions {
  /** Longest sequence of the run. More than the model's positions is an error unless `ropeScaling` covers it. Default: the model's. */
  maxSeqLength?: number;
  /** Quantize the base to NF4 (MXFP4 checkpoints keep their blocks). Default true. */
  loadIn4bit?: boolean;
  /** Default 'cpu'. Asking for 'cuda' where it is not available is an error, never a fallback. */
  device?: DeviceLike;
  /** Replaces the model's RoPE scaling, e.g. { rope_type: 'yarn', factor: 8 }. Default: the model's own, unchanged. */
  ropeScaling?: Readonly<Record<string, unknown>>;
  /** Tokens of an MLP tile. Default: the plan of a run chooses it. */
  tile?: number;
  /** A PEFT LoRA folder to load onto the model. */
  adapter?: string;
}

/** The adapter, in PEFT's names. */
export interface PeftOptions {
  /** Rank. Default 16. */
  r?: number;
  /** Default 16. */
  loraAlpha?: number;
  loraDropout?: number;
  /** Default q, k, v, o and, where the MLP is dense, gate, up, down; 'all-linear': every linear but the head. */
  targetModules?: readonly string[] | 'all-linear';
  /** Fused expert parameters, e.g. 'mlp.experts.gate_up_proj'. */
  targetParameters?: readonly string[];
  useRslora?: boolean;
  /** Only 'none'. */
  bias?: 'none';
  /** Seed of the initial adapter. Default 3407. */
  randomState?: number;
}

/** A loaded model, with or without an adapter. Dispose it at the end. */
export class LanguageModel implements Disposable {
  constructor(
    /** The model's layers and tensors, for composing your own trainer. */
    readonly inner: CausalLM,
    readonly maxSeqLength: number,
    /** Tokens of an MLP tile; undefined: the plan chooses. */
    readonly tile?: number,
  ) {}

  /** Where its weights lie. */
  get device(): Device {
    return this.inner.device;
  }
  /** What is trained: the adapter's; none without one. */
  get parameters(): readonly Parameter[] {
    return this.inner.parameters;
  }

  /** Dimensions, for `plan` of `@lc/vram-probe`. */
  get shape(): ModelShape {
    return shapeOf(this.inner);
  }

  /** Writes the adapter in PEFT's format. @throws ERR_LC_IO, ERR_LC_ADAPTER */
  async savePretrained(folder: string): Promise<void> {
    await saveAdapterOf(this.inner, folder);
  }

  /** Takes an adapter's values over from a folder. @throws ERR_LC_ADAPTER listing what does not fit */
  async loadAdapterWeights(folder: string): Promise<void> {
    await loadAdapterOnto(this.inner, folder);
  }

  /** Continues a text: greedy unless a temperature is given. */
  async generateText(tokenizer: Tokenizer, prompt: string, options: GenerateOptions = {}): Promise<string> {
    return tokenizer.decode(await generate(this.inner, tokenizer.encode(prompt), options));
  }

  /** Gives all of its memory back. */
  dispose(): void {
    this.inner.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** Unsloth's entry point: a model from a folder, and an adapter on it. */
export const FastLanguageModel = {
  /**
   * Loads config.json, safetensors and tokenizer of a folder.
   * @throws ERR_LC_MODEL, ERR_LC_CONFIG, ERR_LC_SAFETENSORS, ERR_LC_NAN, ERR_LC_TOKENIZER, ERR_LC_ADAPTER, ERR_LC_NO_DRIVER and its kin
   */
  async fromPretrained(folder: string, options: FromPretrainedOptions = {}): Promise<{ model: LanguageModel; tokenizer: Tokenizer }> {
    const { loadIn4bit = true, tile, maxSeqLength, device, ropeScaling, adapter } = options;
    if (!existsSync(folder)) {
      throw new LcError(
        'ERR_LC_MODEL',
        `${folder}: no such folder; download the model first and give the folder with its config.json, safetensors and tokenizer`,
      );
    }
    if (adapter !== undefined && !existsSync(join(adapter, 'adapter_config.json')))
      throw new LcError('ERR_LC_ADAPTER', `${adapter}: no adapter_config.json; give a folder that PEFT or lc saved an adapter to`);
    const tokenizer = loadTokenizer(folder);
    const inner = await loadModel(folder, {
      loadIn4bit,
      ...(tile === undefined ? {} : { tile }),
      ...(maxSeqLength === undefined ? {} : { maxSeqLength }),
      ...(device === undefined ? {} : { device }),
      ...(ropeScaling === undefined ? {} : { ropeScaling }),
    });
    try {
      if (tokenizer.vocabSize > inner.config.vocabSize) {
        throw new LcError(
          'ERR_LC_TOKENIZER',
          `${folder}: the tokenizer has ${tokenizer.vocabSize} tokens, the model ${inner.config.vocabSize}; they do not belong together`,
        );
      }
      if (adapter) await loadAdapterOnto(inner, adapter);
      const positions = maxPositions(inner.config);
      return {
        model: new LanguageModel(
          inner,
          maxSeqLength ?? (Number.isFinite(positions) ? positions : inner.config.maxPositionEmbeddings),
          tile,
        ),
        tokenizer,
      };
    } catch (error) {
      inner.dispose();
      throw error;
    }
  },

  /**
   * Puts a LoRA adapter on the model, in place, and returns it.
   * @throws ERR_LC_ADAPTER when a target matches nothing, or the model has an adapter
   */
  getPeftModel(model: LanguageModel, options: PeftOptions = {}): LanguageModel {
    const {
      r = 16,
      loraAlpha = 16,
      loraDropout = 0,
      useRslora = false,
      randomState = 3407,
      targetModules,
      targetParameters,
      bias = 'none',
    } = options;
    if (bias !== 'none') throw new LcError('ERR_LC_ADAPTER', `getPeftModel: bias '${String(bias)}' is not supported; use 'none'`);
    attachLora(model.inner, {
      r,
      loraAlpha,
      loraDropout,
      useRslora,
      seed: randomState,
      ...(targetModules === undefined ? {} : { targetModules }),
      ...(targetParameters === undefined ? {} : { targetParameters }),
    });
    return model;
  },
};
