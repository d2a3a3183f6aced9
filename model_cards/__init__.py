"""The template of a model card, installed as `hf_asentmax.model_cards`, and the cards of the models of this project."""
