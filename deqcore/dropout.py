"""placeholder"""
from torch import nn
class _V(nn.Module): pass
VariationalDropout=VariationalDropout1d=VariationalDropout2d=VariationalDropout3d=VariationalDropToken1d=VariationalDropToken2d=VariationalDropToken3d=_V
def reset_dropout(model): ...
