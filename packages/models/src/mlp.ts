import type { Block, ExpertLinear } from '@lc/tensor';
import { TiledMLP, TiledMoE } from '@lc/tiled-mlp';
import type { ModelConfig } from './config.js';
import { type ExpertModule, expertModule, type LinearModule, linearModule } from './modules.js';
import type { ExpertLayout } from './tensors.js';
import type { WeightLoader } from './weights.js';

/** The MLP of one layer: its replaceable parts, and the block over what they are at present. */
export interface MlpModules {
  /** A block over the present parts, norm and residual included. */
  block(): Block;
  linears(changed: () => void): LinearModule[];
  experts(changed: () => void): ExpertModule[];
}

/** Loads a layer's MLP and the norm before it. */
export function loadMlp(
  loader: WeightLoader,
  config: ModelConfig,
  layer: number,
  experts: ExpertLayout | null,
  tile: number,
): Promise<MlpModules> {
  const prefix = `model.layers.${layer}`;
  return config.layers[layer]?.mlp === 'moe' && experts
    ? loadMoe(loader, config, prefix, experts, tile)
    : loadDense(loader, config, prefix, tile);
}

async function loadDense(loader: WeightLoader, config: ModelConfig, prefix: string, tile: number): Promise<MlpModules> {
  const norm = { weight: await loader.dense(`${prefix}.post_attention_layernorm.weight`), eps: config.rmsNormEps };
  const parts = {
    gateProj: await loader.linear(`${prefix}.mlp.gate_proj`, config.mlpBias),
    upProj: await loader.linear(`${prefix}.mlp.up_proj`, config.mlpBias),
    downProj: await loader.linear(`${prefix}.mlp.down_proj`, config.mlpBias),
  };
  const keys = [
    ['gateProj', 'gate_proj'],
    ['upProj', 'up_proj'],
    ['downProj', 'down_proj'],
  ] as const;
  return {
    block: () => new TiledMLP({ ...parts, norm, tile, activation: 'silu' }),
    linears: (changed) => keys.map(([key, name]) => linearModule(`${prefix}.mlp.${name}`, parts, key, changed)),
    experts: () => [],
  };
}

async function loadMoe(loader: WeightLoader, config: ModelConfig, prefix: string, layout: ExpertLayout, tile: number): Promise<MlpModules> {
  const { moe } = config;
  if (!moe) throw new TypeError('loadMoe: not a mixture of experts');
  const gptOss = moe.kind === 'gpt_oss';
  const mlp = `${prefix}.mlp`;
  const norm = { weight: await loader.dense(`${prefix}.post_attention_layernorm.weight`), eps: config.rmsNormEps };
  const routerName = gptOss ? `${mlp}.router` : `${mlp}.gate`;
  const fixed = {
    router: {
      weight: await loader.dense(`${routerName}.weight`, 'f32'),
      bias: gptOss ? await loader.dense(`${routerName}.bias`, 'f32') : null,
    },
    gateUpBias: gptOss ? await loader.dense(`${mlp}.experts.gate_up_proj_bias`) : null,
    downBias: gptOss ? await loader.dense(`${mlp}.experts.down_proj_bias`) : null,
  };
  const load = async (name: 'gate_up_proj' | 'down_proj'): Promise<ExpertLinear> => {
    const full = `${mlp}.experts.${name}`;
    if (layout === 'gpt_oss') return loader.expertsInputsFirst(full);
    if (layout === 'mxfp4') return loader.expertsMxfp4(full);
    if (layout === 'fused') return loader.expertsFused(full);
    const parts = name === 'down_proj' ? ['down_proj'] : ['gate_proj', 'up_proj'];
    return loader.expertsStacked(moe.numExperts, (e) => parts.map((part) => `${mlp}.experts.${e}.${part}.weight`));
  };
  const parts = { gateUp: await load('gate_up_proj'), down: await load('down_proj') };
  return {
    block: () =>
      new TiledMoE({
        ...{ ...parts, ...fixed, norm, tile },
        kind: gptOss ? 'gpt-oss' : 'qwen3-moe',
        topK: moe.numExpertsPerTok,
        normTopkProb: moe.normTopkProb,
        limit: moe.swigluLimit,
      }),
    linears: () => [],
    // PEFT's layout of an adapter on [experts, out, in] parameters, as Qwen3-MoE's are, has not been checked against a file of its own.
    experts: (changed) =>
      gptOss
        ? [
            expertModule(`${mlp}.experts`, 'gate_up_proj', parts, 'gateUp', changed),
            expertModule(`${mlp}.experts`, 'down_proj', parts, 'down', changed),
          ]
        : [],
  };
}
