import { existsSync, mkdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fromTypedArray, LcError, type Parameter, upload } from '@lc/tensor';
import { atomicWriteFile, openSafetensors, writeSafetensors } from '@lc/tensor/safetensors';
import { type PeftConfig, parsePeftConfig, peftConfigJson } from './peft-config.js';

/** A PEFT adapter in memory: what is in the folder, in f32. */
export interface Adapter {
  readonly config: PeftConfig;
  /** By PEFT's key, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. */
  readonly tensors: ReadonlyMap<string, { readonly shape: readonly number[]; readonly data: Float32Array }>;
}

const WEIGHTS = 'adapter_model.safetensors';
const CONFIG = 'adapter_config.json';
const MAX_CONFIG_BYTES = 1 << 20;

/**
 * PEFT's key prefix of the `index`-th of `count` wrapped parameters of one fused-expert module, in the module's own order (gpt-oss: gate_up_proj before
 * down_proj). Every wrapper encloses the ones before it: the first is `<module>.base_layer`, the last `<module>` itself.
 */
export function expertParameterName(module: string, index: number, count: number): string {
  return module + '.base_layer'.repeat(count - 1 - index);
}

/**
 * Writes `adapter_config.json`, `adapter_model.safetensors` and a model card into `dir` (made if need be), as PEFT's `save_pretrained` does: PEFT,
 * vLLM and others load the folder as it is. Each file is replaced as a whole or not at all; the weights come last. Keys are the parameters' names.
 * @throws ERR_LC_IO
 */
export async function saveAdapter(dir: string, options: { parameters: readonly Parameter[]; config: PeftConfig }): Promise<void> {
  const { parameters, config } = options;
  try {
    mkdirSync(dir, { recursive: true });
  } catch (cause) {
    throw new LcError('ERR_LC_IO', `${dir}: cannot make the folder: ${(cause as Error).message}; choose another one`, { cause });
  }
  await atomicWriteFile(join(dir, CONFIG), peftConfigJson(config));
  if (!existsSync(join(dir, 'README.md'))) await atomicWriteFile(join(dir, 'README.md'), modelCard(config)); // one that was edited stays
  await writeSafetensors(
    join(dir, WEIGHTS),
    parameters.map(({ name, value }) => ({ name, data: value })),
    { format: 'pt' },
  );
}

/** Reads a PEFT LoRA folder. @throws ERR_LC_ADAPTER, ERR_LC_SAFETENSORS, ERR_LC_IO */
export async function loadAdapter(dir: string): Promise<Adapter> {
  const file = join(dir, CONFIG);
  let text: string;
  try {
    if (statSync(file).size > MAX_CONFIG_BYTES) throw new Error(`is larger than ${MAX_CONFIG_BYTES} bytes`);
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    throw new LcError('ERR_LC_IO', `${file}: cannot read: ${(cause as Error).message}; pass a folder that PEFT or lc saved an adapter to`, {
      cause,
    });
  }
  const config = parsePeftConfig(text, file);
  const tensors = new Map<string, { shape: readonly number[]; data: Float32Array }>();
  using weights = await openSafetensors(join(dir, WEIGHTS));
  for (const name of weights.names) {
    const { shape, fileDtype } = weights.info(name);
    if (!['F32', 'BF16', 'F16'].includes(fileDtype)) {
      throw new LcError(
        'ERR_LC_ADAPTER',
        `${weights.path}: '${name}' is ${fileDtype}, expected F32, BF16 or F16; save the adapter in a floating dtype`,
      );
    }
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
    if (data.length > 0) {
      using target = fromTypedArray(data, shape, { label: 'adapter' });
      await weights.readInto(name, target);
    }
    tensors.set(name, { shape, data });
  }
  return { config, tensors };
}

/**
 * Copies an adapter into a model's LoRA parameters.
 * @throws ERR_LC_ADAPTER listing every tensor that is missing, extra, misshapen or not finite; then nothing has been changed
 */
export function applyAdapter(parameters: readonly Parameter[], adapter: Adapter): void {
  const problems: string[] = [];
  const left = new Set(adapter.tensors.keys());
  for (const { name, value } of parameters) {
    const tensor = adapter.tensors.get(name);
    left.delete(name);
    if (!tensor) problems.push(`'${name}' is missing`);
    else if (tensor.shape.length !== value.shape.length || !tensor.shape.every((size, i) => size === value.shape[i])) {
      problems.push(`'${name}' is [${tensor.shape}], the model has [${value.shape}]`);
    } else if (!tensor.data.every(Number.isFinite)) problems.push(`'${name}' holds NaN or infinity`);
  }
  for (const name of left) problems.push(`'${name}' belongs to no module of the model`);
  if (problems.length > 0) {
    throw new LcError(
      'ERR_LC_ADAPTER',
      `applyAdapter: the adapter does not fit the model: ${problems.join('; ')}; use the model it was trained on, with its r and target modules`,
    );
  }
  for (const { name, value } of parameters) upload(value, (adapter.tensors.get(name) as { data: Float32Array }).data);
}

function modelCard(config: PeftConfig): string {
  const base = config.baseModelNameOrPath;
  const scale = config.useRslora ? `${config.loraAlpha} / sqrt(${config.r})` : `${config.loraAlpha} / ${config.r}`;
  const list = (names: readonly string[] | string | null): string =>
    names === null ? 'none' : typeof names === 'string' ? names : names.join(', ');
  return `---
${base === null ? '' : `base_model: ${JSON.stringify(base)}\n`}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- lc
---

# LoRA adapter

| | |
|---|---|
| base model | ${base ?? 'not recorded'} |
| rank | ${config.r} |
| scale | ${scale} |
| dropout in training | ${config.loraDropout} |
| target modules | ${list(config.targetModules)} |
| target parameters | ${list(config.targetParameters)} |

Load it with PEFT:

\`\`\`python
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained(${JSON.stringify(base ?? '<base model>')})
model = PeftModel.from_pretrained(model, "<this folder>")
\`\`\`
`;
}
