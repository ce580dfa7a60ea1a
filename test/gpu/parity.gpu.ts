/**
 * Reference models on the GPU in bf16, against transformers' f32 numbers: relative Frobenius error of each LoRA gradient, deviation of each loss of the
 * ten-step curve. Activations are bf16 here and f32 there, so this shows bf16's noise, not equality.
 */
import { loadAdapterOnto, loadModel, TrainingSession } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { Scope, Workspace } from '@lc/tensor';

function difference(got: Float32Array, want: Float32Array): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < want.length; i++) {
    error += ((got[i] as number) - (want[i] as number)) ** 2;
    norm += (want[i] as number) ** 2;
  }
  return Math.sqrt(error / (norm || 1));
}

/** @param folder reference models, as test/fixtures/reference-models/README.md describes them */
export async function gpuParity(folder: string): Promise<boolean> {
  process.env.LCTX_REFERENCE_MODELS = folder;
  const { readReference, referenceModels } = await import('../parity/reference.js');
  console.log(
    '| model | base loss | adapter loss | gradients: median | worst | curve: worst loss | same bits twice |\n|---|---|---|---|---|---|---|',
  );
  let fine = true;
  for (const name of referenceModels) {
    using scope = new Scope();
    const reference = await readReference(name);
    const model = scope.own(await loadModel(reference.folder, { device: 'cuda', tile: 64 }));
    const ws = scope.own(new Workspace({ device: 'cuda' }));
    const tokens = reference.sequence.inputIds.length;
    const session = scope.own(new TrainingSession({ model, tokens, chunk: 96, lossChunk: 50, ws, storeOptions: { deviceBytes: 0 } }));
    const base = (await session.evaluate(reference.sequence)).loss;
    await loadAdapterOnto(model, `${reference.folder}/adapter`);
    const gradients = async (): Promise<{ loss: number; all: Float32Array[] }> => {
      for (const p of model.parameters) (await import('@lc/tensor')).fill(p.grad, 0);
      const { loss } = await session.step(reference.sequence);
      return { loss, all: await Promise.all(model.parameters.map((p) => p.grad.read())) };
    };
    const first = await gradients();
    const second = await gradients();
    const same = first.loss === second.loss && first.all.every((g, i) => g.every((v, j) => v === (second.all[i] as Float32Array)[j]));
    const errors = model.parameters
      .map((p, i) => difference(first.all[i] as Float32Array, reference.gradients.get(p.name) as Float32Array))
      .sort((a, b) => a - b);
    const optimizer = scope.own(new AdamW(model.parameters, { lr: 2e-3, weightDecay: 0.01 }));
    let curve = 0;
    for (const [want] of reference.curve) {
      optimizer.zeroGrad();
      const { loss } = await session.step(reference.sequence);
      optimizer.step({ maxGradNorm: 1 });
      curve = Math.max(curve, Math.abs(loss - want) / want);
    }
    const e = (v: number): string => v.toExponential(1);
    const relative = (got: number, want: number): number => Math.abs(got - want) / want;
    const worst = errors.at(-1) as number;
    console.log(
      `| ${name} | ${e(relative(base, reference.loss))} | ${e(relative(first.loss, reference.adapterLoss))} | ${e(errors[errors.length >> 1] as number)} | ${e(worst)} | ${e(curve)} | ${same ? 'yes' : 'NO'} |`,
    );
    fine &&= same && Number.isFinite(worst) && worst < 0.1;
  }
  return fine;
}
