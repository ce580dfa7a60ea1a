// Chunked cross-entropy in a training loop that is not lc's. Activations belong to another library (native/tinylib.c) and arrive by DLPack; the head is a
// Float32Array of this program. Both are used where they lie. All that changes in such a loop is the one call that had made the logits of all tokens.
import assert from 'node:assert/strict';
import { chunkedCrossEntropy } from '@lc/chunked-ce';
import { fromDLPack, fromTypedArray, pointerOf, Workspace } from '@lc/tensor';
import { tinylib } from './tinylib.js';

const [tokens, vocab, width, steps, rate] = [8192, 2048, 64, 80, 200];

// The task: each word is followed by one of four, all equally likely. No model can have a mean loss below ln 4 on it.
let state = 7;
const random = (below: number) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * below);
};
const successors = Int32Array.from({ length: vocab * 4 }, () => random(vocab));
function text(length: number): Int32Array {
  const ids = new Int32Array(length);
  for (let i = 1; i < length; i++) ids[i] = successors[4 * (ids[i - 1] as number) + random(4)] as number;
  return ids;
}

// The other library's side: an embedding table, and a buffer for a step's activations. Its optimizer reads their gradient from the same buffer.
const table = tinylib.matrix(vocab, width);
const activations = tinylib.matrix(tokens, width);
// This program's side.
const head = Float32Array.from({ length: vocab * width }, () => (random(1000) / 1000 - 0.5) * 0.4);
const dHead = new Float32Array(head.length);

{
  using hidden = fromDLPack(tinylib.toDLPack(activations)); // [tokens, width]; lc may use it until it is disposed
  using weight = fromTypedArray(head, [vocab, width]);
  using dWeight = fromTypedArray(dHead, [vocab, width]);
  using ws = new Workspace(); // lc's only memory here
  assert.equal(pointerOf(hidden), tinylib.address(activations)); // no copy
  assert.deepEqual(tinylib.live(), [2, 1]);

  for (let step = 1; step <= steps; step++) {
    const ids = text(tokens + 1);
    using labels = fromTypedArray(ids.slice(1), [tokens]); // the next word of each
    tinylib.embed(table, ids.subarray(0, tokens), activations);
    dHead.fill(0);
    const { loss } = chunkedCrossEntropy({ hidden, weight, labels, chunk: 256, dHidden: hidden, dWeight, ws }); // d(hidden) overwrites hidden
    tinylib.embedSgd(table, ids.subarray(0, tokens), activations, rate);
    for (let i = 0; i < head.length; i++) head[i] = (head[i] as number) - rate * (dHead[i] as number);
    if (step === 1 || step % 20 === 0) console.log(`step ${step}: loss ${loss.toFixed(3)} (no model gets below ${Math.log(4).toFixed(3)})`);
  }
  const mib = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  console.log(`logits of all tokens: ${mib(tokens * vocab * 4)}, never made; lc took ${mib(ws.peakBytes)}`);

  // The library may let go first: what lc still holds stays valid.
  tinylib.release(activations);
  assert.deepEqual(tinylib.live(), [2, 1]);
  assert.ok(hidden.data().every(Number.isFinite));
} // `using` disposes here, and lc calls the export's deleter: the activations are freed now, not at some collection

assert.deepEqual(tinylib.live(), [1, 0]);
tinylib.release(table);
assert.deepEqual(tinylib.live(), [0, 0]);
console.log('every export was given back, every matrix is freed');
