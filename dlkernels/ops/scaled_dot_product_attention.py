r"""scaled_dot_product_attention: every query's mean of the values, weighted by how well its key fits, without the matrix of weights in memory.

Forward     z[l,s]  = scale Σ_d q[l,d] k[s,d] + mask[l,s]           -∞ where s is not visible to l
            lse[l]  = log Σ_s exp z[l,s]        p[l,s] = exp(z[l,s] - lse[l])
            y[l,e]  = Σ_s f[l,s] p[l,s] v[s,e]                       f = 1, or dropout's factor
Backward    δ[l]    = Σ_e dy[l,e] y[l,e]        dp[l,s] = f[l,s] Σ_e dy[l,e] v[s,e]
            dz[l,s] = p[l,s] (dp[l,s] - δ[l])                        p is formed again from q, k and lse
            dq[l,d] = scale Σ_s dz[l,s] k[s,d]  dk[s,d] = scale Σ_l dz[l,s] q[l,d]
            dv[s,e] = Σ_l f[l,s] p[l,s] dy[l,e] dmask[l,s] = dz[l,s], summed where the mask was broadcast

Scores are made a tile of queries x keys at a time, and the softmax goes on from tile to tile: a row's largest score and its sum of
exponentials so far, by which what it has summed is corrected when a larger score comes (Milakov, Gimelshein 2018; Dao et al. 2022). A row
that sees no key has weights 0, so y = 0 there, as in torch. What is masked out has no part in anything, whatever number it holds.

f is formed again in the backward from the seed and the place: row (b H + h) S + s, column l (csrc/cpu/philox.h).

Shapes      q (*, H, L, D)   k (*, G, S, D)   v (*, G, S, E)   y (*, H, L, E);   head h reads the keys of head h G / H;   B is the product of *
Work        2BHLS (D + E) flops forward and 2BHLS (3D + 2E) backward, half of them if causal; q, k, v, y moved forward, twice that backward:
            the flops decide
"""
