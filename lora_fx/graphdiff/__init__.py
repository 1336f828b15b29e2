"""How two models' graphs differ.

canonical   a graph as statements with stable names; LoRA subgraphs as one statement
compare     two models, side by side → GraphDiff
difftext    a GraphDiff as text
"""
