/** What workers.test.ts runs in processes of their own: `node program.mjs <what> [argument]`. Answers are JSON on stdout. */
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { dlpackPointer, fromDLPack, fromTypedArray, gemm, leaks, memory, toDLPack, Workspace, zeros } from '@lc/tensor';
import { runTask, tasks } from './tasks.mjs';
import { abandoned } from './worker.mjs';

const answer = (value) => console.log(JSON.stringify(value));
const start = (workerData) => new Worker(new URL('./worker.mjs', import.meta.url), { workerData });
const live = () => Object.values(memory().devices).reduce((sum, device) => sum + device.liveBytes, 0);
const tick = () => new Promise((resolve) => setImmediate(resolve));
const residentKiB = () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1]);
/** Finalizers run on the event loop, some of them a turn later. */
async function collect() {
  for (let i = 0; i < 3; i++) {
    globalThis.gc();
    await tick();
  }
}

const programs = {
  /** Every task here, then in four threads at once. */
  async several() {
    const here = {};
    for (const name of Object.keys(tasks)) here[name] = [await runTask(name)];
    const threads = await Promise.all(Array.from({ length: 4 }, async () => (await once(start({ mode: 'run', rounds: 3 }), 'message'))[0]));
    answer({ here, threads, live: live() });
  },

  /** Threads are stopped at a random moment of their work, several times over. */
  async terminate() {
    const codes = new Set();
    for (let round = 0; round < 4; round++) {
      const threads = Object.keys(tasks).map((task) => start({ mode: 'busy', task }));
      await Promise.all(threads.map((thread) => once(thread, 'message')));
      await sleep(Math.random() * 50);
      for (const code of await Promise.all(threads.map((thread) => thread.terminate()))) codes.add(code);
    }
    answer({ codes: [...codes], live: live() });
  },

  /** A thread ends by itself and leaves everything behind. */
  async abandon() {
    const [code] = await once(start({ mode: 'abandon' }), 'exit');
    answer({ code, live: live() });
  },

  /** The process ends in the middle of a step, with a code of its own. */
  async exit(how) {
    globalThis.kept = abandoned();
    if (how === 'idle') return;
    if (how === 'threads') {
      const threads = Object.keys(tasks).map((task) => start({ mode: 'busy', task }));
      await Promise.all(threads.map((thread) => once(thread, 'message')));
    }
    setTimeout(() => process.exit(7), 100 + Math.random() * 100);
    await runTask('models', { tokens: 400, steps: 1e9 });
  },

  /** The same memory in two threads: an address crosses, and the thread that is last frees it. */
  async share() {
    const t = zeros([1000], { label: 'shared' });
    const script = `
      const { workerData, parentPort } = require('node:worker_threads');
      const { fromDLPack, gemm } = require('@lc/tensor');
      const t = fromDLPack(workerData);
      t.data().fill(2);
      parentPort.once('message', () => { const sum = t.data().reduce((a, b) => a + b, 0); t.dispose(); parentPort.postMessage(sum); parentPort.close(); });
      parentPort.postMessage('written');`;
    const thread = new Worker(script, { eval: true, workerData: dlpackPointer(toDLPack(t)) });
    await once(thread, 'message');
    const seen = t.data()[999];
    t.dispose();
    const between = live();
    thread.postMessage('go');
    const [sum] = await once(thread, 'message');
    await once(thread, 'exit');
    answer({ seen, between, sum, live: live() });
  },

  /** Resident KiB after each of five times `count` cycles. */
  async cycles(kind) {
    const array = new Float32Array(4096);
    const kinds = {
      tensor: () => zeros([64, 64]).dispose(),
      data: () => {
        const t = zeros([64, 64]);
        t.data()[0] = 1;
        t.dispose();
      },
      'typed array': () => fromTypedArray(array, [4096]).dispose(),
      dlpack: () => {
        const t = zeros([64, 64]);
        fromDLPack(toDLPack(t)).dispose();
        t.dispose();
      },
      workspace: () => {
        const ws = new Workspace({ bytes: 1 << 16 });
        ws.alloc([64, 64]);
        ws.dispose();
      },
      work: () => {
        const [a, c] = [zeros([32, 32]), zeros([32, 32])];
        gemm({ a, b: a, c });
        for (const t of [a, c]) t.dispose();
      },
      // A model, its session and two steps: 20 times instead of 10,000.
      session: () => runTask('models'),
    };
    const resident = [];
    for (let round = 0; round < 5; round++) {
      const count = kind === 'session' ? 4 : 2000;
      for (let i = 0; i < count; i++) {
        await kinds[kind]();
        if (i % 100 === 99) await tick();
      }
      await collect();
      resident.push(residentKiB());
    }
    answer({ resident, live: live(), leaks: leaks().length });
  },

  /** Two tensors are forgotten. */
  async leak() {
    const warnings = [];
    process.on('warning', ({ code, message }) => warnings.push({ code, message }));
    (() => {
      for (let i = 0; i < 2; i++) zeros([1000], { label: 'forgotten' }).rows(0, 10);
      zeros([10], { label: 'disposed' }).dispose();
    })();
    const before = live();
    for (let i = 0; i < 20 && leaks().length < 2; i++) await collect();
    await collect();
    answer({ warnings, leaks: leaks(), before, live: live() });
  },
};
await programs[process.argv[2]](process.argv[3]);
