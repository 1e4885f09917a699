#include "simd.h"
namespace ast_fast {
extern "C" bool AST_KERNEL(attention_forward)(const AttentionArgs&) { return false; }
}
