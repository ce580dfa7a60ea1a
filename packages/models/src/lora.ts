import {
  type Adapter,
  applyAdapter,
  expertParameterName,
  LoraExpertLinear,
  LoraLinear,
  loadAdapter,
  type PeftConfig,
  saveAdapter,
} from '@lc/qlora';
import { LcError, type Parameter } from '@lc/tensor';
import type { CausalLM } from './causal-lm.js';
import type { ExpertModule, LinearModule } from './modules.js';

/** As PEFT and Unsloth call them. */
export interface LoraConfig {
  /** Rank. */
  r: number;
  /** Default r. */
  loraAlpha?: number;
  /** Default 0. Not applied to fused experts, where it must be 0. */
  loraDropout?: number;
  /** Scale by loraAlpha / sqrt(r) instead of loraAlpha / r. Default false. */
  useRslora?: boolean;
  /** Names of linears, or ends of their paths (`q_proj`, `self_attn.q_proj`); 'all-linear': every one but the head. Default q, k, v, o and gate, up, down. */
  targetModules?: readonly string[] | 'all-linear';
  /** Fused expert parameters, e.g. `mlp.experts.gate_up_proj` (gpt-oss). Default none. */
  targetParameters?: readonly string[] | null;
  /** Of the initial lora_A. Default 3407. */
  seed?: number;
}

/** What Unsloth and axolotl train when not told otherwise; names that a model does not have are left out only from this default. */
const defaultTargets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];
const PREFIX = 'base_model.model.';

/** PEFT's rule: the whole name, or its end after a dot. */
const matches = (name: string, target: string): boolean => name === target || name.endsWith(`.${target}`);

/**
 * Puts a LoRA over every linear and fused expert parameter that a target names; the base stays frozen. Parameters are named as PEFT names them.
 * @throws ERR_LC_ADAPTER when a target matches nothing (listing what there is), or the model has an adapter already; ERR_LC_ARGUMENT
 */
export function attachLora(model: CausalLM, config: LoraConfig): readonly Parameter[] {
  if (model.adapterConfig)
    throw new LcError('ERR_LC_ADAPTER', 'attachLora: the model has an adapter already; load it again to start from the base');
  const linears = selectLinears(model, config.targetModules);
  const experts = selectExperts(model, config.targetParameters ?? []);
  const { r, loraAlpha = r, loraDropout = 0, useRslora = false, seed = 3407 } = config;
  const options = { r, loraAlpha, useRslora, seed, device: model.device };
  const made: (() => void)[] = [];
  for (const module of linears) {
    const lora = model.own(new LoraLinear({ ...options, base: module.linear, loraDropout, name: PREFIX + module.name }));
    made.push(() => module.replace(lora));
  }
  for (const group of experts.values()) {
    for (const [index, module] of group.entries()) {
      const name = expertParameterName(PREFIX + module.module, index, group.length);
      const lora = model.own(new LoraExpertLinear({ ...options, base: module.experts, loraDropout, name }));
      made.push(() => module.replace(lora));
    }
  }
  for (const put of made) put(); // only now that every one could be made
  model.adapterConfig = {
    r,
    loraAlpha,
    loraDropout,
    useRslora,
    targetModules:
      config.targetModules === 'all-linear'
        ? [...new Set(linears.map((module) => lastPart(module.name)))]
        : namesIn(linears, config.targetModules),
    targetParameters: config.targetParameters?.length ? [...config.targetParameters] : null,
    baseModelNameOrPath: model.folder,
    taskType: 'CAUSAL_LM',
  };
  return model.parameters;
}

const lastPart = (name: string): string => name.slice(name.lastIndexOf('.') + 1);
const namesIn = (linears: readonly LinearModule[], targets: readonly string[] = defaultTargets): string[] =>
  targets.filter((target) => linears.some((module) => matches(module.name, target)));

function selectLinears(model: CausalLM, targets: LoraConfig['targetModules']): LinearModule[] {
  if (targets === 'all-linear') return [...model.linearModules];
  const found = model.linearModules.filter((module) => (targets ?? defaultTargets).some((target) => matches(module.name, target)));
  const unmatched = (targets ?? []).filter((target) => !model.linearModules.some((module) => matches(module.name, target)));
  if (unmatched.length > 0) {
    const kinds = [...new Set(model.linearModules.map((module) => module.name.replace(/^model\.layers\.\d+\./, '')))];
    const fused =
      model.expertModules.length > 0
        ? `; experts are fused parameters: name ${kindsOf(model.expertModules).join(' or ')} in targetParameters`
        : '';
    throw new LcError(
      'ERR_LC_ADAPTER',
      `attachLora: targetModules ${unmatched.map((t) => `'${t}'`).join(', ')} match nothing; the model has ${kinds.join(', ')} in ${model.layers.length} layers${fused}`,
    );
  }
  return found;
}

const kindsOf = (modules: readonly ExpertModule[]): string[] => [
  ...new Set(modules.map((module) => module.name.replace(/^model\.layers\.\d+\./, ''))),
];

/** By `...mlp.experts` module, in the module's own order of parameters. */
function selectExperts(model: CausalLM, targets: readonly string[]): Map<string, ExpertModule[]> {
  const unmatched = targets.filter((target) => !model.expertModules.some((module) => matches(module.name, target)));
  if (unmatched.length > 0) {
    const there =
      model.expertModules.length > 0 ? `the model has ${kindsOf(model.expertModules).join(', ')}` : 'the model has no fused experts';
    throw new LcError(
      'ERR_LC_ADAPTER',
      `attachLora: targetParameters ${unmatched.map((t) => `'${t}'`).join(', ')} match nothing; ${there}`,
    );
  }
  const groups = new Map<string, ExpertModule[]>();
  for (const module of model.expertModules) {
    if (!targets.some((target) => matches(module.name, target))) continue;
    groups.set(module.module, [...(groups.get(module.module) ?? []), module]);
  }
  return groups;
}

/**
 * Loads a PEFT adapter folder onto a model: attaches LoRA as its config says, or, where the model has one, takes the values over.
 * @throws ERR_LC_ADAPTER listing everything that does not fit, ERR_LC_SAFETENSORS, ERR_LC_IO
 */
export async function loadAdapterOnto(model: CausalLM, folder: string): Promise<Adapter> {
  const adapter = await loadAdapter(folder);
  const { config } = adapter;
  if (!model.adapterConfig) {
    const { targetModules } = config;
    if (typeof targetModules === 'string' && targetModules !== 'all-linear') {
      throw new LcError(
        'ERR_LC_ADAPTER',
        `${folder}: target_modules is a regular expression (${targetModules}); write it as a list of module names`,
      );
    }
    attachLora(model, { ...config, targetModules: targetModules ?? [], targetParameters: config.targetParameters });
  }
  applyAdapter(model.parameters, adapter);
  return adapter;
}

/** Writes the model's adapter as PEFT does. @throws ERR_LC_ADAPTER when there is none, ERR_LC_IO */
export async function saveAdapterOf(model: CausalLM, folder: string, overrides: Partial<PeftConfig> = {}): Promise<void> {
  if (!model.adapterConfig) throw new LcError('ERR_LC_ADAPTER', 'saveAdapterOf: the model has no adapter; call attachLora first');
  await saveAdapter(folder, { parameters: model.parameters, config: { ...model.adapterConfig, ...overrides } });
}
