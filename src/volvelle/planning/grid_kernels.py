"""The compiled inner loops of stock_grid: one backward step on scores, and on laws. Memory-bound; benchmarks/planning.py measures them."""
from __future__ import annotations

import numpy as np
from numba import njit

compiled = njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


@compiled
def choose(offsets, next_state, probability, cells, fraction, score, new_score, policy):
    """Greedy step on expected utilities: score [S, N] of the next time -> new_score [S, N] and the maximising actions policy [S, N].

    Totals that leave the grid stay at its edge; a covering grid never lets that reach a start stock.
    """
    S, N = score.shape
    A = (len(offsets) - 1) // S
    q = np.empty((A, N))
    for s in range(S):
        for a in range(A):
            row = q[a]
            row[:] = 0.0
            for o in range(offsets[s * A + a], offsets[s * A + a + 1]):
                p, k, w, v = probability[o], cells[o], fraction[o], score[next_state[o]]
                low = min(max(0, -k), N)
                high = max(min(N, N - 1 - k), low)
                for j in range(low):
                    row[j] += p * v[0]
                if w == 0.0:
                    for j in range(low, high):
                        row[j] += p * v[j + k]
                else:
                    for j in range(low, high):
                        row[j] += p * ((1 - w) * v[j + k] + w * v[j + k + 1])
                for j in range(high, N):
                    row[j] += p * v[N - 1]
        best, arg = new_score[s], policy[s]
        best[:] = q[0]
        arg[:] = 0
        for a in range(1, A):
            row = q[a]
            for j in range(N):
                if row[j] > best[j] + 1e-12:
                    best[j] = row[j]
                    arg[j] = a


@compiled
def mix(offsets, next_state, probability, cells, fraction, policy, laws, new_laws):
    """The policy's Bellman operator: laws [S, N, K] of the next time -> new_laws [S, N, K], each a mixture of the successors' laws."""
    S, N, K = laws.shape
    A = (len(offsets) - 1) // S
    for s in range(S):
        for j in range(N):
            row, first = new_laws[s, j], offsets[s * A + policy[s, j]]
            for o in range(first, offsets[s * A + policy[s, j] + 1]):
                k = min(max(j + cells[o], 0), N - 1)
                w = probability[o] * fraction[o] if j + cells[o] >= 0 else 0.0
                near = probability[o] - w
                x, y = laws[next_state[o], k], laws[next_state[o], min(k + 1, N - 1)]
                if o == first:
                    if w == 0.0:
                        for i in range(K):
                            row[i] = near * x[i]
                    else:
                        for i in range(K):
                            row[i] = near * x[i] + w * y[i]
                elif w == 0.0:
                    for i in range(K):
                        row[i] += near * x[i]
                else:
                    for i in range(K):
                        row[i] += near * x[i] + w * y[i]
