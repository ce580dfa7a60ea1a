/** `loadDataset`: files to packed sequences, in a seeded order that can be resumed. */
import { LcError } from '@lc/tensor';
import { type ChatMessage, ChatTemplate } from './chat-template.js';
import { type FileType, listFiles, parseLine, readLines, readText, typeOfFile } from './files.js';
import { fingerprint, shuffled } from './order.js';
import {
  describeReport,
  type ExcessLengthStrategy,
  excessLengthStrategies,
  joinDocuments,
  type LengthReport,
  limitLength,
  type PackedSequence,
  packSamples,
  type TokenizedSample,
} from './packing.js';
import type { Tokenizer } from './tokenizer.js';

/** A sample before tokenization, for a `mask`. */
export interface RawSample {
  /** The text that was tokenized. */
  text: string;
  /** For `messages` rows. */
  messages?: readonly ChatMessage[];
}

/** Files, tokenizer and length of a dataset, and what becomes of samples. */
export interface DatasetOptions {
  /** Files or folders. */
  paths: readonly string[];
  tokenizer: Tokenizer;
  /** Longest sequence, in tokens. */
  maxLength: number;
  /** Default 'auto': .jsonl and .ndjson are lines of JSON (`text` or `messages`), everything else is text, one document a file. */
  type?: FileType | 'auto';
  /** Several documents a sequence; default true. */
  packing?: boolean;
  /** Default 'raise'. */
  excessLengthStrategy?: ExcessLengthStrategy;
  /** Shuffle documents anew each epoch; default true. */
  shuffle?: boolean;
  seed?: number;
  /** Default: the tokenizer's. */
  chatTemplate?: string;
  /** Milliseconds a template may take per conversation. */
  templateTimeout?: number;
  /** What templates see as today. */
  date?: Date;
  /** End text documents with the EOS token; default true where the tokenizer has one. */
  appendEos?: boolean;
  /** Which tokens are learnt: returns labels (the id, or -100) of a tokenized sample. Default: all. */
  mask?: (inputIds: Int32Array, sample: RawSample) => Int32Array;
  /** Told of dropped, truncated, split or too short samples; default prints to stderr. */
  onNotice?: (message: string) => void;
}

/** Where an iteration stands. */
export interface DatasetState {
  epoch: number;
  index: number;
  /** Of the data and the options that decide its order: a state is refused by another dataset. */
  fingerprint: string;
}

function checkMaxLength(maxLength: number): void {
  if (Number.isInteger(maxLength) && maxLength >= 2) return;
  throw new LcError('ERR_LC_DATA', `dataset: maxLength must be a whole number of at least 2 tokens, got ${maxLength}`);
}

/** Tokenized documents in memory, packed anew each epoch. The order depends on seed and epoch alone, so two numbers resume it. */
export class PackedDataset {
  /** What the length strategy did. */
  readonly report: LengthReport;
  /** Tokens of all documents. */
  readonly tokens: number;
  private readonly samples: TokenizedSample[];
  private at = { epoch: 0, index: 0 };
  private mark: string | undefined;
  private packed: { epoch: number; sequences: TokenizedSample[][] } | undefined;

  constructor(
    samples: readonly TokenizedSample[],
    private readonly options: {
      maxLength: number;
      packing: boolean;
      shuffle: boolean;
      seed: number;
      excessLengthStrategy: ExcessLengthStrategy;
    },
  ) {
    checkMaxLength(options.maxLength);
    const limited = limitLength(samples, options.maxLength, options.excessLengthStrategy);
    this.report = limited.report;
    this.samples = limited.samples;
    this.tokens = this.samples.reduce((sum, s) => sum + s.inputIds.length, 0);
    if (this.samples.length === 0) throw new LcError('ERR_LC_DATA', 'dataset: nothing to train on: no sample has two tokens or more');
  }

  /** Sequences of an epoch. */
  length(epoch = this.at.epoch): number {
    return this.sequences(epoch).length;
  }

  /** The next sequence; after the last of an epoch comes the first of the next. */
  next(): PackedSequence {
    const sequences = this.sequences(this.at.epoch);
    const packed = joinDocuments(sequences[this.at.index] as TokenizedSample[]);
    this.at =
      this.at.index + 1 < sequences.length ? { epoch: this.at.epoch, index: this.at.index + 1 } : { epoch: this.at.epoch + 1, index: 0 };
    return packed;
  }

  /** All sequences of one epoch, without moving the iteration: for evaluation. */
  *epoch(epoch = 0): Generator<PackedSequence> {
    for (const documents of this.sequences(epoch)) yield joinDocuments(documents);
  }

  /** Where the iteration stands, for `restore`. */
  state(): DatasetState {
    return { ...this.at, fingerprint: this.fingerprint() };
  }

  /** @throws ERR_LC_DATA when the state is not one of this dataset: other files, another tokenizer, length or seed. */
  restore(state: unknown): void {
    const s = state as Partial<DatasetState> | null;
    const whole = (v: unknown): v is number => Number.isSafeInteger(v) && (v as number) >= 0;
    const known = s && whole(s.epoch) && whole(s.index) && s.fingerprint === this.fingerprint() && s.index < this.length(s.epoch);
    if (!known) {
      throw new LcError(
        'ERR_LC_DATA',
        `dataset: cannot resume at ${JSON.stringify(state)}: the files, the tokenizer, maxLength, packing or the seed are not what they were ` +
          `(this dataset is ${this.fingerprint()}); restore them, or start anew`,
      );
    }
    this.at = { epoch: s.epoch as number, index: s.index as number };
  }

  /** Splits off the last `count` sequences' documents of epoch 0 for evaluation. */
  split(count: number): { train: PackedDataset; test: PackedDataset } {
    const sequences = this.sequences(0);
    if (!Number.isInteger(count) || count < 1 || count >= sequences.length) {
      throw new LcError('ERR_LC_DATA', `dataset: cannot hold out ${count} of ${sequences.length} sequences; both parts need at least one`);
    }
    const options = { ...this.options, excessLengthStrategy: 'raise' as const };
    return {
      train: new PackedDataset(sequences.slice(0, -count).flat(), options),
      test: new PackedDataset(sequences.slice(-count).flat(), { ...options, shuffle: false }),
    };
  }

  private fingerprint(): string {
    const { maxLength, packing, shuffle, seed } = this.options;
    this.mark ??= fingerprint(this.samples, [maxLength, packing, shuffle, seed]);
    return this.mark;
  }

  private sequences(epoch: number): TokenizedSample[][] {
    if (this.packed?.epoch !== epoch) {
      const { shuffle, seed, maxLength, packing } = this.options;
      const order = shuffle ? shuffled(this.samples, (seed + Math.imul(epoch, 0x85ebca6b)) >>> 0) : this.samples;
      this.packed = { epoch, sequences: packSamples(order, maxLength, packing) };
    }
    return this.packed.sequences;
  }
}

function isMessages(value: unknown): value is ChatMessage[] {
  return (
    Array.isArray(value) &&
    value.length > 0 &&
    value.every((m: unknown) => m !== null && typeof m === 'object' && typeof (m as ChatMessage).role === 'string')
  );
}

/**
 * Reads, templates and tokenizes files, then packs them.
 * @throws ERR_LC_DATA (file and line named), ERR_LC_TEMPLATE, ERR_LC_TOKENIZER
 */
export async function loadDataset(options: DatasetOptions): Promise<PackedDataset> {
  const {
    tokenizer,
    maxLength,
    type = 'auto',
    packing = true,
    excessLengthStrategy = 'raise',
    shuffle = true,
    seed = 0,
    appendEos = true,
    mask,
  } = options;
  if (!excessLengthStrategies.includes(excessLengthStrategy)) {
    throw new LcError(
      'ERR_LC_DATA',
      `dataset: excessLengthStrategy must be one of ${excessLengthStrategies.join(', ')}, got ${String(excessLengthStrategy)}`,
    );
  }
  checkMaxLength(maxLength);
  const files = options.paths.flatMap(listFiles);
  if (files.length === 0) throw new LcError('ERR_LC_DATA', 'dataset: no files given');
  const samples: TokenizedSample[] = [];
  const push = (ids: Int32Array, source: string, raw: RawSample): void => {
    if (ids.length === 0) throw new LcError('ERR_LC_DATA', `${source}: no tokens; is the tokenizer or the chat template the model's own?`);
    const labels = mask ? mask(ids, raw) : ids.slice();
    if (labels.length !== ids.length)
      throw new LcError('ERR_LC_DATA', `${source}: the mask returned ${labels.length} labels for ${ids.length} tokens`);
    samples.push({ inputIds: ids, labels, source });
  };
  const pushText = (text: string, source: string): void => {
    let ids = tokenizer.encode(text);
    if (appendEos && tokenizer.eosTokenId !== null && ids.at(-1) !== tokenizer.eosTokenId) {
      const ended = new Int32Array(ids.length + 1);
      ended.set(ids);
      ended[ids.length] = tokenizer.eosTokenId;
      ids = ended;
    }
    push(ids, source, { text });
  };

  const template = options.chatTemplate ?? tokenizer.chatTemplate;
  let chat: ChatTemplate | undefined;
  try {
    for (const file of files) {
      if ((type === 'auto' ? typeOfFile(file) : type) === 'text') {
        pushText(readText(file), file);
        continue;
      }
      let rows = 0;
      for (const line of readLines(file)) {
        rows++;
        const source = `${file}:${line.number}`;
        const row = parseLine(file, line);
        if (typeof row.text === 'string') {
          if (row.text.trim() === '') throw new LcError('ERR_LC_DATA', `${source}: "text" is empty; remove the line`);
          pushText(row.text, source);
        } else if (isMessages(row.messages)) {
          if (!template)
            throw new LcError('ERR_LC_DATA', `${source}: a row of messages, but the tokenizer has no chat template; pass chatTemplate`);
          chat ??= new ChatTemplate(template, {
            bosToken: tokenizer.bosToken,
            eosToken: tokenizer.eosToken,
            ...(options.templateTimeout === undefined ? {} : { timeout: options.templateTimeout }),
            ...(options.date === undefined ? {} : { date: options.date }),
          });
          const text = await chat.render(row.messages, Array.isArray(row.tools) ? { tools: row.tools } : {}).catch((error: unknown) => {
            if (error instanceof LcError) throw new LcError(error.code, `${source}: ${error.message}`, { cause: error });
            throw error;
          });
          // The template writes BOS and EOS itself.
          push(tokenizer.encode(text, { addSpecialTokens: false }), source, { text, messages: row.messages });
        } else {
          throw new LcError(
            'ERR_LC_DATA',
            `${source}: expected "text" (a string) or "messages" (a list of { role, content }), got keys ${Object.keys(row).join(', ') || '(none)'}`,
          );
        }
      }
      if (rows === 0) throw new LcError('ERR_LC_DATA', `${file}: no rows; remove it from the dataset`);
    }
  } finally {
    await chat?.close();
  }
  const dataset = new PackedDataset(samples, { maxLength, packing, shuffle, seed, excessLengthStrategy });
  const notice = describeReport(dataset.report);
  if (notice) (options.onNotice ?? ((message: string) => console.error(`[lc] ${message}`)))(notice);
  return dataset;
}
