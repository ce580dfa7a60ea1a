/** What the store asks of streams and events. `Stream` and `Event` of `@lc/tensor` satisfy it; tests put late-running ones in their place. */
import { type Device, Event, Stream, type Tensor } from '@lc/tensor';

/** What a store needs of a stream. */
export interface StreamLike {
  /** dst = src, ordered on this stream; dtype and shape are the same. */
  copy(dst: Tensor, src: Tensor): void;
  /** Later work of this stream starts after the latest `record` of `event` made so far (none: no wait). */
  wait(event: EventLike): void;
  /** Resolves when everything queued so far is done. */
  sync(): Promise<void>;
  /** Gives it back to the driver. */
  dispose(): void;
}

/** What a store needs of an event. */
export interface EventLike {
  /** Takes the place of an earlier `record`: what is queued on the stream so far. */
  record(stream: StreamLike): void;
  /** Resolves when everything before the latest `record` is done. */
  sync(): Promise<void>;
  /** Milliseconds from an earlier event to this one, both made with `timing` and done. Profiles need it. */
  elapsedSince?(earlier: EventLike): number;
  /** Gives it back to the driver. */
  dispose(): void;
}

/** Makes the store's two copy streams and its events. */
export interface StreamFactory {
  /** A stream of its own on the device. */
  stream(device: Device): StreamLike;
  /** An event on the device; `timing`: one that `elapsedSince` may be asked of. */
  event(device: Device, options?: { timing?: boolean }): EventLike;
}

/** Streams and events of `@lc/tensor`: what a store uses unless it is given others. */
export const tensorStreams: StreamFactory = {
  stream: (device) => new Stream(device),
  event: (device, options) => new Event(device, options),
};
