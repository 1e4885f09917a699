#include "simd.h"
namespace ast_fast {
extern "C" bool AST_KERNEL(attention_backward)(const AttentionArgs&) { return false; }
}
