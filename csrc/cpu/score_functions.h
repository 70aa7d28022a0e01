// Score functions of attention: z = f(x, behind), of x = scale q.k and of how far the query lies behind the key, and dz/dx beside it.
// The codes are the places in dlkernels/ops/score_functions.py. To add one: a name in the enum, a case below.
#pragma once
#include "math.h"
#include "simd.h"

enum ScoreCode { PLAIN, SOFTCAP, SCORE_FUNCTIONS };

template <class V> struct Bent {
    V z, slope;  // dz/dx
};

struct ScoreFunction {
    int64_t code = PLAIN;
    double a = 0;  // its parameter

    // use(function) with the one that `code` names; T is float or double.
    template <class T, class Use> void with(const Use& use) const {
        using V = vec<T>;
        const V a = set(T(this->a)), inverse = set(T(1 / this->a)), one = set(T(1));
        switch (code) {
            case SOFTCAP:
                return use([=](V x, V) {
                    V t = tanh<T>(x * inverse);
                    return Bent<V>{a * t, one - t * t};
                });
            default: return use([=](V x, V) { return Bent<V>{x, one}; });
        }
    }
};
