"""Models of other frameworks in, ours out: Hugging Face folders, GGUF, CTranslate2 weights, ONNX.

mapping.py        one entry per tensor: a name there, names here, and the two ways between them
family.py         Family: what is to be known of one architecture; reading and checking its config.json
decoders.py       Llama, GPT-2, OPT, Falcon
translators.py    T5, BART, Marian
encoders.py       BERT
hugging_face.py   import and export of folders with config.json, safetensors and tokenizer.json
gguf.py           import and export of GGUF files
ctranslate2.py    import of CTranslate2 Transformers
onnx.py           export of an ONNX graph
checkpoint.py     an imported model as a checkpoint of ours
"""
