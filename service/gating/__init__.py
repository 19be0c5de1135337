"""Exclusive vectors added inside an unmodified HF model. Imports core and errors, and tensors of `experts`.

Start at `bank.py`. `sites.py` finds where an exclusive vector can act, `resident.py` turns an expert's
factors into device tensors, `working_set.py` packs those of the active experts, `layers.py` does
y = W*x + Σ g_t·U_tΣ_t(V_tᵀx) inside the layer, `prepack.py` is the seam to faster base products.
"""
