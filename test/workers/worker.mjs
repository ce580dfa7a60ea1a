/** A thread. `run`: does every task, round after round, and answers what they gave. `busy`: works at one task until it is stopped, with tensors that nobody disposes. */
import { parentPort, workerData } from 'node:worker_threads';
import { fromPointer, fromTypedArray, pointerOf, toDLPack, zeros } from '@lc/tensor';
import { runTask, tasks } from './tasks.mjs';

/** One of each kind of memory, with what looks into it; left to the end of the thread. */
export function abandoned() {
  const t = zeros([1000], { label: 'abandoned' });
  t.data();
  const borrowed = fromPointer({ ptr: pointerOf(t), device: 'cpu', shape: [1000], dtype: 'f32', release: () => {} });
  return [t, borrowed, fromTypedArray(new Float32Array(10), [10]), toDLPack(t)];
}

const { mode, rounds = 1, task } = workerData ?? {};
if (mode === 'run') {
  const results = {};
  for (let round = 0; round < rounds; round++) {
    for (const name of Object.keys(tasks)) {
      results[name] ??= new Set();
      results[name].add(await runTask(name));
    }
  }
  parentPort.postMessage(Object.fromEntries(Object.entries(results).map(([name, set]) => [name, [...set]])));
} else if (mode === 'busy') {
  globalThis.kept = abandoned();
  const working = () => parentPort.postMessage('working');
  if (task === 'models') await runTask(task, { tokens: 400, steps: 1e9, onStep: working });
  for (;;) {
    await runTask(task);
    working();
  }
} else if (mode === 'abandon') {
  globalThis.kept = abandoned();
}
