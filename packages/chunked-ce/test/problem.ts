import { randomNormal, seededRandom } from '@lc/tensor/testing';
import type { CrossEntropyOptions } from '../src/index.js';

export type Features = CrossEntropyOptions & { weighted?: boolean; bias?: boolean };

const features: [string, Features][] = [
  ['bias', { bias: true }],
  ['label smoothing', { labelSmoothing: 0.2 }],
  ['z-loss', { zLoss: 1e-2 }],
  ['soft cap', { softCap: 3 }],
  ['logit scale', { logitScale: 1.7 }],
  ['token weights', { weighted: true }],
];

/** Every combination of features: 64. */
export const combinations: [string, Features][] = Array.from({ length: 2 ** features.length }, (_, bits) => {
  const on = features.filter((_feature, i) => bits & (1 << i));
  return [on.map(([name]) => name).join(' + ') || 'plain', Object.assign({}, ...on.map(([, o]) => o)) as Features];
});

/** Random inputs; about `ignored` of the labels are -100, and every fourth token weight is 0. */
export function problem(n: number, width: number, vocab: number, o: Features, ignored = 0.3) {
  const random = seededRandom(n * 7 + vocab);
  const { weighted, bias, ...rest } = o;
  return {
    ...rest,
    n,
    width,
    vocab,
    hidden: randomNormal(n * width, 1),
    weight: randomNormal(vocab * width, 2, 1 / Math.sqrt(width)),
    bias: bias ? randomNormal(vocab, 3) : null,
    labels: Int32Array.from({ length: n }, () => (random() < ignored ? -100 : Math.floor(random() * vocab))),
    tokenWeights: weighted ? Float32Array.from({ length: n }, (_, i) => (i % 4 === 0 ? 0 : random() + 0.5)) : null,
    numTokens: 17,
  };
}
export type Problem = ReturnType<typeof problem>;
