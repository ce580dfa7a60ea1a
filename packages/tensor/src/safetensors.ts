/**
 * `@lc/tensor/safetensors`: reads and writes safetensors files (https://huggingface.co/docs/safetensors), single or sharded. Headers are not trusted:
 * everything is checked against the file before a byte of a tensor is read.
 * @module @lc/tensor/safetensors
 */

export { openSafetensorsFolder, SafetensorsFolder } from './safetensors/folder.js';
export { maxHeaderBytes, type SafetensorsDType, type TensorInfo } from './safetensors/header.js';
export { openSafetensors, SafetensorsFile, type SafetensorsReader } from './safetensors/reader.js';
export { atomicWriteFile, type SafetensorsEntry, writeSafetensors } from './safetensors/writer.js';
