"""The work of the commands `hf-xlstm VERB`; `hf_xlstm_cli` reads their options before any of this is imported."""
