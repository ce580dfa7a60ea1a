import { LcError } from '@lc/tensor';

/** The part of PEFT's LoraConfig that lc trains. */
export interface PeftConfig {
  r: number;
  loraAlpha: number;
  loraDropout: number;
  useRslora: boolean;
  /** Module names (suffixes of their paths), or one regular expression. */
  targetModules: readonly string[] | string | null;
  /** 3-D expert parameters, e.g. `mlp.experts.gate_up_proj`. */
  targetParameters: readonly string[] | null;
  /** Folder or hub name of the model that the adapter belongs to. */
  baseModelNameOrPath: string | null;
  taskType: string | null;
  /** Of the file that was read; informative. */
  peftVersion?: string;
}

/** The oldest PEFT with `target_parameters`; no key below is newer, so that every PEFT since then loads the file without a warning. */
const PEFT_VERSION = '0.17.0';

/** adapter_config.json as PEFT writes it, for inference (`inference_mode`), keys sorted. */
export function peftConfigJson(config: PeftConfig): string {
  const json: Record<string, unknown> = {
    alpha_pattern: {},
    auto_mapping: null,
    base_model_name_or_path: config.baseModelNameOrPath,
    bias: 'none',
    exclude_modules: null,
    fan_in_fan_out: false,
    inference_mode: true,
    init_lora_weights: true,
    layer_replication: null,
    layers_pattern: null,
    layers_to_transform: null,
    loftq_config: {},
    lora_alpha: config.loraAlpha,
    lora_bias: false,
    lora_dropout: config.loraDropout,
    modules_to_save: null,
    peft_type: 'LORA',
    peft_version: PEFT_VERSION,
    r: config.r,
    rank_pattern: {},
    revision: null,
    target_modules: config.targetModules,
    target_parameters: config.targetParameters,
    task_type: config.taskType,
    trainable_token_indices: null,
    use_dora: false,
    use_rslora: config.useRslora,
  };
  return `${JSON.stringify(json, null, 2)}\n`;
}

/** Keys that do not change what an inference or a continued training computes, whatever their value. */
const ignored = new Set([
  'auto_mapping',
  'base_model_name_or_path',
  'inference_mode',
  'init_lora_weights',
  'loftq_config',
  'eva_config',
  'corda_config',
  'lora_ga_config',
  'megatron_core',
  'peft_version',
  'qalora_group_size',
  'revision',
  'ensure_weight_tying',
  'runtime_config',
]);
const read = new Set([
  'peft_type',
  'r',
  'lora_alpha',
  'lora_dropout',
  'use_rslora',
  'target_modules',
  'target_parameters',
  'task_type',
  'bias',
]);

const isOff = (value: unknown): boolean =>
  value === null ||
  value === false ||
  (Array.isArray(value) && value.length === 0) ||
  (typeof value === 'object' && Object.keys(value as object).length === 0);
const isStrings = (value: unknown): value is string[] => Array.isArray(value) && value.every((v) => typeof v === 'string');

/**
 * Reads adapter_config.json. Whatever lc would compute differently (DoRA, rank patterns, saved modules, a key it does not know with a value) is refused.
 * @throws ERR_LC_ADAPTER, one error that lists all problems
 */
export function parsePeftConfig(text: string, file: string): PeftConfig {
  let json: Record<string, unknown>;
  try {
    json = JSON.parse(text) as Record<string, unknown>;
  } catch (cause) {
    throw new LcError('ERR_LC_ADAPTER', `${file}: is not JSON (${(cause as Error).message}); save the adapter again`, { cause });
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    throw new LcError('ERR_LC_ADAPTER', `${file}: expected a JSON object; save the adapter again`);
  const problems: string[] = [];
  const expect = (key: string, ok: boolean, want: string): void => {
    if (!ok) problems.push(`${key} must be ${want}, is ${JSON.stringify(json[key])}`);
  };
  expect('peft_type', json.peft_type === 'LORA', '"LORA"');
  expect('r', Number.isInteger(json.r) && (json.r as number) > 0, 'a whole number above 0');
  expect('lora_alpha', typeof json.lora_alpha === 'number' && json.lora_alpha !== 0, 'a number other than 0');
  const dropout = json.lora_dropout ?? 0;
  expect('lora_dropout', typeof dropout === 'number' && dropout >= 0 && dropout < 1, 'in [0, 1)');
  expect('use_rslora', json.use_rslora === undefined || typeof json.use_rslora === 'boolean', 'true or false');
  const modules = json.target_modules ?? null;
  expect(
    'target_modules',
    modules === null || typeof modules === 'string' || isStrings(modules),
    'a list of names or a regular expression',
  );
  const parameters = json.target_parameters ?? null;
  expect('target_parameters', parameters === null || isStrings(parameters), 'a list of names');
  expect('bias', json.bias === undefined || json.bias === 'none', '"none"');
  for (const [key, value] of Object.entries(json)) {
    if (!read.has(key) && !ignored.has(key) && !isOff(value)) problems.push(`${key} = ${JSON.stringify(value)} is not supported`);
  }
  if (problems.length > 0) {
    throw new LcError(
      'ERR_LC_ADAPTER',
      `${file}: ${problems.join('; ')}. lc reads LoRA and rsLoRA adapters without variants; merge this one with PEFT, or train a plain LoRA`,
    );
  }
  return {
    r: json.r as number,
    loraAlpha: json.lora_alpha as number,
    loraDropout: dropout as number,
    useRslora: json.use_rslora === true,
    targetModules: modules as string[] | string | null,
    targetParameters: parameters as string[] | null,
    baseModelNameOrPath: typeof json.base_model_name_or_path === 'string' ? json.base_model_name_or_path : null,
    taskType: typeof json.task_type === 'string' ? json.task_type : null,
    ...(typeof json.peft_version === 'string' ? { peftVersion: json.peft_version } : {}),
  };
}
