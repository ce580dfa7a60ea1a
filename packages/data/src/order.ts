/** What makes an iteration repeatable: a seeded order, and a fingerprint of the data that it is an order of. */
import type { TokenizedSample } from './packing.js';

/** Fisher-Yates over a 32-bit mixer: the same order on every machine. */
export function shuffled<T>(items: readonly T[], seed: number): T[] {
  let state = seed >>> 0;
  const next = (): number => {
    state = (state + 0x9e3779b9) >>> 0;
    let t = state ^ (state >>> 16);
    t = Math.imul(t, 0x21f0aaad);
    t ^= t >>> 15;
    t = Math.imul(t, 0x735a2d97);
    return ((t ^ (t >>> 15)) >>> 0) / 4294967296;
  };
  const out = items.slice();
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(next() * (i + 1));
    [out[i], out[j]] = [out[j] as T, out[i] as T];
  }
  return out;
}

/** 64 bits over every id and label, and the options that decide the order. Not for secrecy: it tells other data apart. */
export function fingerprint(samples: readonly TokenizedSample[], options: unknown): string {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  const mix = (value: number): void => {
    a = Math.imul(a ^ value, 0x01000193);
    a ^= a >>> 13;
    b = Math.imul(b ^ value, 0x5bd1e995);
    b ^= b >>> 15;
  };
  for (const char of JSON.stringify(options)) mix(char.charCodeAt(0));
  for (const { inputIds, labels } of samples) {
    mix(inputIds.length);
    for (const id of inputIds) mix(id);
    for (const label of labels) mix(label);
  }
  const hex = (n: number): string => (n >>> 0).toString(16).padStart(8, '0');
  return hex(a) + hex(b);
}
