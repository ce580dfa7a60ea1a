import type { ExpertLinear, Linear } from '@lc/tensor';

/** A linear of the model, under its Hugging Face path, that something may be put over. */
export interface LinearModule {
  /** e.g. `model.layers.0.self_attn.q_proj` */
  readonly name: string;
  readonly linear: Linear;
  /** Puts another linear into the place of this one, e.g. a LoRA over it; disposes nothing. */
  replace(linear: Linear): void;
}

/** A fused expert weight of the model. */
export interface ExpertModule {
  /** e.g. `model.layers.0.mlp.experts.gate_up_proj` */
  readonly name: string;
  /** e.g. `model.layers.0.mlp.experts` */
  readonly module: string;
  readonly experts: ExpertLinear;
  /** Puts another linear into the place of this one, e.g. a LoRA over it; disposes nothing. */
  replace(experts: ExpertLinear): void;
}

/** A handle on one field of `owner`; `changed` is called after it was replaced. */
export function linearModule<K extends string>(
  name: string,
  owner: Record<K, Linear>,
  key: K,
  changed: () => void = () => {},
): LinearModule {
  return {
    name,
    get linear(): Linear {
      return owner[key];
    },
    replace(linear) {
      owner[key] = linear;
      changed();
    },
  };
}

export function expertModule<K extends string>(
  module: string,
  field: string,
  owner: Record<K, ExpertLinear>,
  key: K,
  changed: () => void,
): ExpertModule {
  return {
    name: `${module}.${field}`,
    module,
    get experts(): ExpertLinear {
      return owner[key];
    },
    replace(experts) {
      owner[key] = experts;
      changed();
    },
  };
}
