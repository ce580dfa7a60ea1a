/** Documents of tokens to fixed-size sequences with document boundaries. */
import { LcError } from '@lc/tensor';

/** One tokenized document. */
export interface TokenizedSample {
  inputIds: Int32Array;
  /** Aligned with inputIds, not shifted; -100: not learnt. */
  labels: Int32Array;
  /** Where it came from, for messages: `file` or `file:line`. */
  source: string;
}

/** One training sequence: documents laid end to end. Attention and positions start anew at each. */
export interface PackedSequence {
  /** [tokens] */
  inputIds: Int32Array;
  /** [tokens], NOT shifted; -100 is ignored. The first token of each document is -100: nothing before it predicts it. */
  labels: Int32Array;
  /** `[tokens]`, index, in this sequence, of the first token of the token's document. */
  docStart: Int32Array;
  /** Labels that count towards the loss. */
  supervised: number;
}

/** The values of `ExcessLengthStrategy`. */
export const excessLengthStrategies = ['raise', 'drop', 'truncate', 'split'] as const;
/** What to do with a document that is longer than a sequence. */
export type ExcessLengthStrategy = (typeof excessLengthStrategies)[number];

/** How many documents were too long or too short, and what became of them. */
export interface LengthReport {
  samples: number;
  tokens: number;
  dropped: number;
  droppedTokens: number;
  truncated: number;
  truncatedTokens: number;
  split: number;
  /** Pieces that the split ones became. */
  pieces: number;
  /** Documents, or last pieces of split ones, of fewer than two tokens: left out, since they have nothing to predict. */
  short: number;
}

const part = (s: TokenizedSample, start: number, end: number): TokenizedSample => ({
  inputIds: s.inputIds.subarray(start, end),
  labels: s.labels.subarray(start, end),
  source: s.source,
});

/**
 * Applies the strategy to over-long documents.
 * @throws ERR_LC_DATA with 'raise', naming the longest and the counts.
 */
export function limitLength(
  samples: readonly TokenizedSample[],
  maxLength: number,
  strategy: ExcessLengthStrategy,
): { samples: TokenizedSample[]; report: LengthReport } {
  const report: LengthReport = {
    samples: samples.length,
    tokens: 0,
    dropped: 0,
    droppedTokens: 0,
    truncated: 0,
    truncatedTokens: 0,
    split: 0,
    pieces: 0,
    short: 0,
  };
  const out: TokenizedSample[] = [];
  let longest: TokenizedSample | undefined;
  let over = 0;
  for (const sample of samples) {
    const length = sample.inputIds.length;
    report.tokens += length;
    if (length <= maxLength) {
      out.push(sample);
      continue;
    }
    over++;
    if (!longest || length > longest.inputIds.length) longest = sample;
    if (strategy === 'drop') {
      report.dropped++;
      report.droppedTokens += length;
    } else if (strategy === 'truncate') {
      report.truncated++;
      report.truncatedTokens += length - maxLength;
      out.push(part(sample, 0, maxLength));
    } else if (strategy === 'split') {
      report.split++;
      for (let at = 0; at < length; at += maxLength) {
        report.pieces++;
        out.push(part(sample, at, Math.min(length, at + maxLength)));
      }
    }
  }
  if (strategy === 'raise' && longest) {
    throw new LcError(
      'ERR_LC_DATA',
      `${over} of ${samples.length} samples are longer than ${maxLength} tokens (the longest: ${longest.source}, ${longest.inputIds.length}); ` +
        `raise the sequence length, or choose an excess length strategy: 'split' (trains on everything), 'truncate' or 'drop'`,
    );
  }
  const kept = out.filter((s) => s.inputIds.length > 1);
  report.short = out.length - kept.length;
  return { samples: kept, report };
}

/** The report in words, or null when every document is trained on whole. */
export function describeReport(r: LengthReport): string | null {
  const parts: string[] = [];
  if (r.dropped > 0)
    parts.push(`dropped ${r.dropped} of ${r.samples} samples that were too long (${r.droppedTokens} of ${r.tokens} tokens)`);
  if (r.truncated > 0)
    parts.push(`truncated ${r.truncated} of ${r.samples} samples (${r.truncatedTokens} of ${r.tokens} tokens are not trained on)`);
  if (r.split > 0) parts.push(`split ${r.split} of ${r.samples} samples into ${r.pieces} pieces`);
  if (r.short > 0) parts.push(`left out ${r.short} of a single token: nothing to predict`);
  return parts.length > 0 ? parts.join('; ') : null;
}

/** Lays documents end to end into one sequence. */
export function joinDocuments(documents: readonly TokenizedSample[]): PackedSequence {
  const total = documents.reduce((sum, d) => sum + d.inputIds.length, 0);
  const packed: PackedSequence = {
    inputIds: new Int32Array(total),
    labels: new Int32Array(total),
    docStart: new Int32Array(total),
    supervised: 0,
  };
  let at = 0;
  for (const d of documents) {
    packed.inputIds.set(d.inputIds, at);
    packed.labels.set(d.labels, at);
    packed.labels[at] = -100;
    packed.docStart.fill(at, at, at + d.inputIds.length);
    at += d.inputIds.length;
  }
  for (const label of packed.labels) if (label !== -100) packed.supervised++;
  return packed;
}

/** How many half-filled sequences are kept open while packing. */
const OPEN_SEQUENCES = 64;

/**
 * Best-fit packing in the given order, with a bounded number of open sequences: documents are never cut, and an epoch's order stays close to the
 * shuffled one. With `packing` false, one document a sequence.
 */
export function packSamples(samples: readonly TokenizedSample[], maxLength: number, packing: boolean): TokenizedSample[][] {
  if (!packing) return samples.map((s) => [s]);
  const done: TokenizedSample[][] = [];
  const open: { documents: TokenizedSample[]; room: number }[] = [];
  for (const sample of samples) {
    const length = sample.inputIds.length;
    let slot: (typeof open)[number] | undefined;
    for (const s of open) if (s.room >= length && (!slot || s.room < slot.room)) slot = s;
    if (!slot) {
      if (open.length === OPEN_SEQUENCES) done.push((open.shift() as (typeof open)[number]).documents);
      slot = { documents: [], room: maxLength };
      open.push(slot);
    }
    slot.documents.push(sample);
    slot.room -= length;
    if (slot.room === 0) {
      open.splice(open.indexOf(slot), 1);
      done.push(slot.documents);
    }
  }
  return [...done, ...open.map((s) => s.documents)];
}
